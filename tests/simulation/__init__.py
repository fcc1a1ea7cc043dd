"""The simulated world: the real control plane and the real agents over everything that can go wrong."""
