"""Names things: resource types, selectors, quantities, errors. No I/O."""
