"""Decides: pure planners, thin reconcilers, and the machinery they run on. No outside I/O."""
