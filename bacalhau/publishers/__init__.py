"""What brings outputs to a target: one module per type of target."""
