"""The durable store: objects, history and leases in one JetStream stream."""
