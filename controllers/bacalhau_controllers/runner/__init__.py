"""The node's side: what it was asked to run, what runs, what it has yet to tell."""
