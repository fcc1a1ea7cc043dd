"""NATS: the connection, the embedded server, its configuration, and how names become subjects."""
