"""Moving bytes between this node and the world: vetted addresses, HTTP, threads, progress."""
