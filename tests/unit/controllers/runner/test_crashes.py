"""The agent dies at every call that changes the world, and comes back: each story ends as it would
have without that, nothing runs twice, and no report goes backwards."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.execution import Phase, PublicationPhase
from bacalhau_api.v1.job import JobType, RestartPolicy
from bacalhau_controllers.runner.ledger import MemoryLedger
from bacalhau_controllers.runner.machine import check
from bacalhau_controllers.runner.state import Stage
from tests.support.runner import World, execution, publication, stopped
from tests.support.simclock import SimLoop


@dataclass
class Fate:
    """Lets the agent die at the `at`-th call; from then on nothing it does has an effect."""

    at: int = 0
    count: int = 0
    is_dead: bool = False
    calls: list[str] = field(default_factory=list)

    async def boundary(self, what: str) -> None:
        self.count += 1
        self.calls.append(what)
        if self.count == self.at:
            self.is_dead = True
        if self.is_dead:
            await asyncio.Event().wait()

    def revive(self) -> None:
        self.is_dead = False


Story = Callable[[World], None]


def run_story(story: Story, fate: Fate, *, reboot: bool = False) -> World:
    """Play a story to its end; when the agent dies, start another at once."""
    with SimLoop() as loop:
        w = World(loop, boundary=fate.boundary)
        restart = RestartPolicy(backoff_seconds=1)
        a = execution("a", seconds=3, inputs=("/x",))
        b = execution("b", seconds=2, exit_code=7)
        c = execution("c", seconds=None)
        d = execution("d", seconds=None)
        s = execution("s", job_type=JobType.SERVICE, seconds=4, restart=restart)
        w.storage.errors = [UnavailableError("once")]
        events: list[tuple[float, Callable[[], None]]] = [
            (0.0, lambda: keep(w, a, b, c, d, s)),
            (5.0, lambda: keep(w, stopped(c))),
            (6.0, lambda: drop(w, "uid-d")),
            (8.0, lambda: keep(w, publication(a))),
        ]
        w.start()
        deaths = 0
        for now in range(120):
            for at, event in events:
                if at == now:
                    event()
            loop.advance(1.0)
            if fate.is_dead and deaths == 0:
                deaths += 1
                (w.reboot if reboot else w.kill)()
                fate.revive()
                w.start()
        story(w)
        assert w.hub.problems + w.workspace.problems == []
        w.kill()
        return w


def keep(w: World, *things: object) -> None:
    """Change what is wanted, telling the node if it listens."""
    task = w.loop.create_task(quietly(w, *things))
    w.loop.run_until_idle()
    task.cancel()
    w.loop.run_until_idle()


async def quietly(w: World, *things: object) -> None:
    try:
        await w.hub.assign(*things)  # type: ignore[arg-type]
    except UnavailableError:
        pass


def drop(w: World, uid: str) -> None:
    one = w.hub.executions[uid]

    async def go() -> None:
        try:
            await w.hub.drop(one)
        except UnavailableError:
            pass

    task = w.loop.create_task(go())
    w.loop.run_until_idle()
    task.cancel()
    w.loop.run_until_idle()


def same_end(w: World) -> None:
    """Where the story leads, whatever happened on the way."""
    assert isinstance(w.ledger, MemoryLedger)
    book = w.ledger.stored
    a, b, c = (w.hub.report(name) for name in "abc")
    assert (a.phase, a.exit_code) == (Phase.SUCCEEDED, 0)
    assert (b.phase, b.exit_code) == (Phase.FAILED, 7)
    assert (c.phase, c.reason) == (Phase.STOPPED, "UserRequest")
    assert w.hub.report("s").phase is Phase.RUNNING
    assert w.hub.report("s").run > 4
    assert "uid-d" not in book.states
    assert ("default", "d") not in w.workspace.directories
    assert w.hub.publication_reports["pub-a"].phase is PublicationPhase.DELIVERED
    assert w.publisher.delivered["pub-a"] >= 1
    assert all(check(state) == () for state in book.states.values())
    assert {uid: state.stage for uid, state in book.states.items() if uid != "uid-s"} == {
        "uid-a": Stage.DONE,
        "uid-b": Stage.DONE,
        "uid-c": Stage.DONE,
    }
    assert all(count == 1 for count in w.engine.started.values()), w.engine.started
    left = {run_id.split(".")[0] for run_id in w.engine.runs}
    assert left <= {"s"}


def first_runs_only(w: World) -> None:
    """Without a reboot, nothing that was finished or running is run again."""
    same_end(w)
    assert {r for r in w.engine.started if not r.startswith("s.")} <= {"a.1", "b.1", "c.1", "d.1"}


def count_calls() -> int:
    fate = Fate()
    run_story(first_runs_only, fate)
    # Each kind of call has to be among those at which the agent dies.
    assert set(fate.calls) >= {
        "ledger.commit", "ledger.committed", "engine.open", "engine.start", "engine.started",
        "engine.ended", "engine.stop", "engine.stopped", "engine.remove", "engine.removed",
        "storage.fetch", "workspace.collect", "workspace.remove", "publisher.publish",
        "publisher.published",
    }  # fmt: skip
    return fate.count


CALLS_MAX = 140
"""The eventful part of the story; after it only the service goes on restarting."""


def test_the_story_without_a_crash() -> None:
    assert count_calls() > CALLS_MAX


@pytest.mark.parametrize("at", range(1, CALLS_MAX))
def test_the_agent_dies_at_any_call(at: int) -> None:
    run_story(first_runs_only, Fate(at))


@pytest.mark.parametrize("at", range(1, CALLS_MAX))
def test_the_machine_loses_its_power_at_any_call(at: int) -> None:
    run_story(same_end, Fate(at), reboot=True)
