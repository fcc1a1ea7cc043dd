"""A thousand nodes come back within a second: all are served, none asks for more than it needs, and
users are answered meanwhile. Times are simulated, so that no machine is too slow for this."""

import pytest

from bacalhau_api.meta import Contact, ObjectMeta
from bacalhau_api.v1.job import Job, JobType
from bacalhau_api.v1.node import Node
from tests.simulation.world import Faults, World

NODES = 1000


def reachable(world: World) -> int:
    return sum(
        isinstance(node, Node) and node.status.contact is Contact.REACHABLE
        for node in world.store.everything("Node")
    )


def is_complete(world: World) -> bool:
    return reachable(world) == NODES and all(
        machine.agent is not None and machine.agent.is_welcome for machine in world.machines
    )


class Asker:
    """Applies one job after the other, and notes how long each answer took."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.waits: list[float] = []

    def begin(self) -> None:
        one = next(one for one in self.world.orchestrators if one.is_serving)
        assert one.life is not None
        one.life.spawn(self._ask(), "asker")

    async def _ask(self) -> None:
        one = next(one for one in self.world.orchestrators if one.is_serving)
        assert one.actions is not None
        for number in range(50):
            spec = self.world.users.spec(JobType.BATCH).but(suspend=False)
            job = Job(metadata=ObjectMeta(name=f"job-{number}"), spec=spec)
            began = self.world.now
            await one.actions.apply_job(job, "user:alice")
            self.waits.append(self.world.now - began)
            await self.world.clock.sleep(0.02)


@pytest.mark.timeout(300)
def test_a_thousand_nodes_come_back_at_once() -> None:
    def script(world: World) -> None:
        world.wait(lambda: is_complete(world), seconds_max=60)
        for machine in world.machines:
            machine.line.up = machine.line.down = False
            machine.line.set_connected(False)
        world.wait(lambda: reachable(world) == 0, seconds_max=60)
        messages, writes = world.server.messages, world.checker.writes
        asker = Asker(world)
        asker.begin()
        for machine in world.machines:
            machine.line.up = machine.line.down = True
            world.later(world.rng.random(), lambda line=machine.line: line.set_connected(True))  # type: ignore[misc]
        took = world.wait(lambda: is_complete(world), seconds_max=60)
        assert took < 10.0
        assert len(asker.waits) >= 40
        assert max(asker.waits) < 0.5
        assert world.checker.writes - writes < 3 * NODES
        assert world.server.messages - messages < 10 * NODES

    World(1, Faults.none(), nodes=NODES).play(script)
