"""A deterministic world for the real orchestrators and agents: virtual time, a store, a network,
machines and users, all with faults, from one seed. See `world.World`."""

from tests.simulation.world.faults import Fault, Faults
from tests.simulation.world.world import World

__all__ = ["Fault", "Faults", "World"]
