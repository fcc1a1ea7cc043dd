"""Talks to the world: command line, API server, store, transport, node agent and its plugs."""
