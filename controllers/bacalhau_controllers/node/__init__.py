"""Nodes: whether they take part, whether they are heard from, what they say they can do."""
