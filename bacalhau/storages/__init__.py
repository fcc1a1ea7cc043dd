"""What brings inputs to the node: one module per type of source."""
