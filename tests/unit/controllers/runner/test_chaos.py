"""Random faults from a seed, then none: the node ends where it should, having kept its promises on
the way. A failing seed repeats itself exactly."""

from random import Random

import pytest

from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import JobType, Resources, RestartPolicy
from bacalhau_controllers.runner.ledger import MemoryLedger
from bacalhau_controllers.runner.machine import check
from bacalhau_controllers.runner.state import Limits, Stage
from tests.support.runner import World, execution, stopped
from tests.support.simclock import SimLoop

STEPS = 150
DEADLINE = 20
ROOMY = Resources(cpu_millis=100_000, memory_bytes=1 << 40)
LIMITS = Limits(start_try_seconds=8, stop_grace_seconds=1, stop_margin_seconds=5)


class Chaos:
    """One seed's story."""

    def __init__(self, loop: SimLoop, seed: int) -> None:
        self.loop = loop
        self.rng = Random(seed)
        self.w = World(loop, limits=LIMITS, policy={"capacity": ROOMY})
        self.count = 0
        self.alive_since = loop.time()
        self.quiet_since = loop.time()
        self.w.start()

    def tell(self, *things: Execution, is_gone: bool = False) -> None:
        async def go() -> None:
            try:
                await (self.w.hub.drop(*things) if is_gone else self.w.hub.assign(*things))
            except UnavailableError:
                pass

        task = self.loop.create_task(go())
        self.loop.run_until_idle()
        if not task.done():  # an answer that never comes
            task.cancel()
            self.loop.run_until_idle()

    def new_execution(self) -> None:
        self.count += 1
        rng = self.rng
        job_type = rng.choice([JobType.BATCH, JobType.BATCH, JobType.OPS, JobType.SERVICE])
        self.tell(
            execution(
                f"x{self.count}",
                job_type=job_type,
                seconds=rng.choice([1, 3, 10, 40, None]),
                exit_code=rng.choice([0, 0, 0, 1]),
                inputs=rng.choice([(), ("/x",)]),
                timeout=rng.choice([0, 0, 25]),
                local_deadline=rng.choice([None, None, DEADLINE]),
                restart=RestartPolicy(backoff_seconds=1, backoff_seconds_max=5),
            )
        )

    def some(self) -> Execution | None:
        held = list(self.w.hub.executions.values())
        return self.rng.choice(held) if held else None

    def act(self) -> None:
        """One thing happens."""
        w, rng = self.w, self.rng
        one, link = self.some(), w.hub.link
        match rng.randrange(20):
            case 0 | 1 | 2 | 3:
                self.new_execution()
            case 4 if one is not None:
                version = one.metadata.resource_version + 1
                self.tell(stopped(one, version=version))
            case 5 if one is not None:
                self.tell(one, is_gone=True)
            case 6 | 7 if link is not None:
                link.set_up(not link.is_up)
            case 8:
                w.hub.is_deaf = not w.hub.is_deaf
            case 9:
                w.hub.lose_acks += rng.randrange(3)
            case 10:
                self.restart(is_boot=False)
            case 11 if rng.random() < 0.4:
                self.restart(is_boot=True)
            case 12:
                w.engine.starts_hang = rng.random() < 0.3
            case 13:
                w.engine.is_silent = rng.random() < 0.2
            case 14:
                w.engine.stops_fail = rng.random() < 0.3
            case 15 if isinstance(w.ledger, MemoryLedger):
                w.ledger.is_full = rng.random() < 0.3
            case 16:
                w.clock.set_forward(rng.choice([-7200, 7200, 3]))
            case 17 if w.engine.running():
                w.engine.vanish(rng.choice(w.engine.running()))
            case 18 if rng.random() < 0.3:
                self.lose_one()
            case 19:
                w.storage.errors.append(UnavailableError("no route"))

    def lose_one(self) -> None:
        """Somebody removes a run by hand. (Before the node has noted that it was started, that
        cannot be told from one that never was, and it is started.)"""
        assert isinstance(self.w.ledger, MemoryLedger)
        book = self.w.ledger.stored
        noted = [
            run_id
            for run_id in self.w.engine.running()
            for state in [book.states.get(f"uid-{run_id.rpartition('.')[0]}")]
            if state is not None and state.stage is Stage.RUNNING
        ]
        if noted:
            self.w.engine.lose(self.rng.choice(noted))

    def restart(self, *, is_boot: bool) -> None:
        is_up = self.w.hub.link.is_up if self.w.hub.link else False
        (self.w.reboot if is_boot else self.w.kill)()
        self.loop.advance(self.rng.choice([0, 1, 30]))
        self.w.start(is_up=is_up)
        self.alive_since = self.loop.time()

    def heal(self) -> None:
        w = self.w
        w.hub.is_deaf = w.engine.starts_hang = w.engine.is_silent = w.engine.stops_fail = False
        w.hub.lose_acks = 0
        assert isinstance(w.ledger, MemoryLedger)
        w.ledger.is_full = False
        assert w.hub.link is not None
        w.hub.link.set_up(True)

    def check(self) -> None:
        """What holds at every moment."""
        w = self.w
        assert w.hub.problems + w.workspace.problems == []
        assert all(count == 1 for count in w.engine.started.values())
        for worker in w.live.workers.values():
            assert check(worker.state) == ()
        # The engine's word on stops cannot be forced; without a fault of its own, the policy is.
        since = max(w.hub.heard_at, self.alive_since, self.quiet_since)
        if w.engine.stops_fail or w.engine.is_silent or w.engine.starts_hang:
            self.quiet_since = self.loop.time() + 60
        elif self.loop.time() - since > DEADLINE + 3:
            for run_id in w.engine.running():
                of = w.hub.executions.get(f"uid-{run_id.rpartition('.')[0]}")
                assert of is None or of.spec.local_deadline_seconds is None, (run_id, since)


@pytest.mark.parametrize("seed", range(20))
def test_faults_are_survived(seed: int) -> None:
    with SimLoop() as loop:
        chaos = Chaos(loop, seed)
        w = chaos.w
        for _ in range(STEPS):
            chaos.act()
            loop.advance(chaos.rng.choice([0.01, 0.5, 1, 4]))
            chaos.check()
        chaos.heal()
        for _ in range(180):
            loop.advance(5)
            chaos.check()
        converged(w)
        w.kill()


def converged(w: World) -> None:
    """Where everything has to be when nothing has gone wrong for long enough."""
    assert isinstance(w.ledger, MemoryLedger)
    book = w.ledger.stored
    assert set(book.states) == {uid for uid in book.states if uid in w.hub.executions}, (
        "what nobody wants is gone"
    )
    assert not book.facts
    running = set(w.engine.running())
    for uid, of in w.hub.executions.items():
        report = w.hub.reports[uid]
        assert uid in book.states or report.phase.is_final
        is_endless = of.spec.task.engine.params["seconds"] == "for ever"
        is_service = of.spec.job_type is JobType.SERVICE
        timeout = of.spec.task.timeouts.execution_timeout
        if of.spec.desired is Desired.STOP or not (is_service or (is_endless and not timeout)):
            assert report.phase.is_final, (of.name, report)
        if not report.phase.is_final:
            assert report.waiting is not None
        if report.phase is Phase.RUNNING and is_endless and not timeout:
            assert f"{of.name}.{report.run}" in running
    live = {
        f"{book.executions[uid].name}.{state.run}"
        for uid, state in book.states.items()
        if state.stage is not Stage.DONE
    }
    assert running <= live
    names = {one.name for one in w.hub.executions.values()}
    assert {name for _, name in w.workspace.directories} <= names
