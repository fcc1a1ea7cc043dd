"""The world: from a seed to a verdict.

    World(seed).run()

First a time of work and faults, then everything is healed, then it must come to rest within a
bounded time, and stay there. Whatever is wrong raises `Failure`, whose message says all that is
needed to look into it and to run it again.
"""

import asyncio
import gc
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.job import Resources
from bacalhau_controllers.store import Why
from tests.simulation.world.chaos import Chaos
from tests.simulation.world.checker import Checker, Violation
from tests.simulation.world.faults import Fault, Faults
from tests.simulation.world.life import PartyClock, WorldLoop
from tests.simulation.world.machines import Machine
from tests.simulation.world.network import Server
from tests.simulation.world.orchestrators import Orchestrator
from tests.simulation.world.rest import unsettled, wrong
from tests.simulation.world.storage import TrueStore
from tests.simulation.world.trace import Trace
from tests.simulation.world.users import Users

T = TypeVar("T")

QUIET_SECONDS = 65.0
"""Without a write, before the world may count as settled: more than one sweep."""

REST_SECONDS_MAX = 1800.0
"""Within which everything must have settled after the last fault."""

STILL_SECONDS = 70.0
"""For so long nothing may be written then: with the quiet before, two sweeps of everybody."""


REWORDINGS_MAX = 3


class Failure(AssertionError):
    """A seed that fails, in words."""

    def __init__(self, world: "World", violation: Violation) -> None:
        self.invariant = violation.invariant
        self.seed = world.seed
        super().__init__(_describe(world, violation))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run that held all invariants did."""

    seed: int
    digest: str
    events: int
    writes: int
    runs: int
    accepted: int
    seconds: float
    settled_after: float


class CountedIds:
    """Identities that look random and come in order."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    def uid(self) -> str:
        """32 hex digits."""
        return f"{self._rng.getrandbits(128):032x}"


class World:
    """Everything there is, on one loop."""

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        *,
        fault_seconds: float | None = None,
        is_strict: bool = False,
        nodes: int | None = None,
    ) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.asked_faults = faults
        self.rng.getrandbits(64)  # went into the faults
        self.faults = Faults.of_seed(seed) if faults is None else faults
        self.no_faults = Faults.none()
        self.fault_seconds = fault_seconds or self.rng.choice([60.0, 120.0, 240.0])
        self.is_healed = False
        self.on_write: Callable[[Orchestrator, str], None] | None = None
        """Called before and after each write of an orchestrator; may crash it."""
        self.on_boundary: Callable[[Machine, str], None] | None = None
        """Called wherever an agent touches its world (ledger, engine, disk); may crash it."""
        self.violation: Violation | None = None
        self.failed_at = 0.0
        self.trace = Trace()
        self.loop = WorldLoop()
        self.context = copy_context()
        self.clock = PartyClock(self.loop)
        self.store = TrueStore(self.clock, strict=is_strict)
        self.checker = Checker(self)
        self.store.before_commit = self.checker.before_commit
        self.store.on_commit = self.checker.committed
        self.server = Server(self.loop, self.fork(), self.faults)
        self.users = Users(self, self.fork())
        self.chaos = Chaos(self, self.fork())
        self.orchestrators = [
            Orchestrator(self, f"o{i}", self.fork()) for i in range(self.rng.choice([1, 2, 2]))
        ]
        self.node_names = [f"n{i}" for i in range(nodes or self.rng.randint(2, 5))]
        self.machines: list[Machine] = []
        for name in self.node_names:
            self.add_machine(name, name)

    # -- services for its parts ------------------------------------------------------------------

    @property
    def now(self) -> float:
        """True time, in seconds since the start."""
        return self.loop.time()

    def fork(self) -> Random:
        """A source of randomness of one's own, so that one part's draws do not shift another's."""
        return Random(self.rng.getrandbits(64))

    def ids(self, name: str) -> CountedIds:
        """Identities for one party."""
        return CountedIds(Random(f"{self.seed}/{name}/{self.trace.count}"))

    def new_clock(self, rng: Random) -> PartyClock:
        """The clocks of a new party."""
        drift = self.faults.rate(Fault.CLOCK_DRIFT)
        if not drift:
            return PartyClock(self.loop)
        # The wall clock drifts far more than the monotonic one may.
        rate, wall = 1 + rng.uniform(-drift, drift), 1 + rng.uniform(-50 * drift, 50 * drift)
        return PartyClock(self.loop, rate=rate, wall_rate=wall)

    def happens(self, fault: Fault, rng: Random) -> bool:
        """Whether a fault with a chance strikes now."""
        if self.is_healed:
            return False
        rate = self.faults.rate(fault)
        return rate > 0 and rng.random() < rate

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something by the world's own hand."""
        self.loop.call_later(seconds, action, context=self.context)

    async def moment(self) -> None:
        """Let others have their turn."""
        await asyncio.sleep(0)

    def note(self, what: str, subject: object, text: object = "") -> None:
        """Something happened."""
        self.trace.note(self.now, what, subject, text)

    def note_write(self, ref: Ref, why: Why, new: Resource | None) -> None:
        """Something was written."""
        version = new.metadata.resource_version if new is not None else "gone"
        status = getattr(new, "status", None)
        phase = getattr(status, "phase", "")
        self.note("write", ref, f"{why.actor} {why.reason} {version} {phase}")

    def fail(self, violation: Violation) -> None:
        """An invariant does not hold: remember the first, and stop."""
        if self.violation is None:
            self.violation, self.failed_at = violation, self.now
            self.note("violation", violation.invariant, violation)
            self.loop.call_soon(self.loop.stop)

    def add_machine(self, name: str, node: str) -> Machine:
        """One more machine."""
        rng = self.fork()
        capacity = Resources(
            cpu_millis=rng.choice([1000, 2000, 3000]), memory_bytes=1 << 30, disk_bytes=1 << 30
        )
        twins = [one for one in self.machines if one.node == node]
        if twins:
            capacity = twins[0].capacity
        machine = Machine(self, name, node, capacity, {"zone": rng.choice("ab")}, rng)
        self.machines.append(machine)
        return machine

    # -- a run -----------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """From the beginning to the verdict. Raises Failure."""
        with _bugs_count(self), _few_collections(), self.loop:
            try:
                self._begin()
                self._advance(self.fault_seconds)
                self._heal()
                settled = self._settle()
                self._keep_still()
                return Outcome(
                    seed=self.seed,
                    digest=self.trace.digest,
                    events=self.trace.count,
                    writes=self.checker.writes,
                    runs=self.checker.runs,
                    accepted=self.checker.accepted,
                    seconds=self.now,
                    settled_after=settled,
                )
            finally:
                self._end()

    def play(self, script: Callable[["World"], T]) -> T:
        """Begin, and then do something of one's own, without users and chaos. Invariants are
        checked as in a run."""
        with _bugs_count(self), _few_collections(), self.loop:
            try:
                self._begin()
                self._chaos.cancel()
                self._demand.cancel()
                result = script(self)
                self._advance(0)
                return result
            finally:
                self._end()

    def _begin(self) -> None:
        for name in self.node_names:
            self._do(self.users.enrol(name))
        for orchestrator in self.orchestrators:
            self.later(self.rng.uniform(0, 2), orchestrator.start)
        for machine in self.machines:
            self.later(self.rng.uniform(0, 2), machine.start)
        self._chaos = self.loop.create_task(self.chaos.run(), name="chaos", context=self.context)
        self._demand = self.loop.create_task(self._work(), name="users", context=self.context)

    async def _work(self) -> None:
        """Users want things; disks are copied now and then."""
        while True:
            await self.clock.sleep(self.rng.expovariate(1 / 6.0))
            self.users.act()
            if self.rng.random() < 0.2:
                self.rng.choice(self.machines).remember()

    def _heal(self) -> None:
        """The faults are over; operators put everything back in order."""
        self._chaos.cancel()
        self._demand.cancel()
        self.note("heal", "world")
        self._advance(0)
        self.is_healed = True
        self.server.faults = self.no_faults
        # What was to happen later does so within a few minutes, and can do no more harm then.
        self._advance(30.0)
        for machine in list(self.machines):
            machine.heal()
            if machine.name not in self.node_names:
                machine.reboot()
                machine.is_retired = True
                machine.engine.runs.clear()
        for one in self.orchestrators:
            one.start()
            if one.store is not None:
                one.store.heal()
        for machine in self.machines:
            machine.line.up = machine.line.down = True
            machine.line.set_connected(True)
            machine.start()
        self.loop.run_until(lambda: any(one.is_serving for one in self.orchestrators))
        self._do(self.users.repair())

    def _settle(self) -> float:
        """Wait until nothing is left to do; return how long that took."""
        began = self.now
        why: list[str] = []
        while self.now - began < REST_SECONDS_MAX:
            self._advance(5.0)
            if self.now - max(self.checker.last_write_at, began) < QUIET_SECONDS:
                continue
            why = unsettled(self)
            if not why:
                return self.checker.last_write_at - began
        why = why or ["it is still being written to"]
        raise self._failure(Violation("I9", "no rest; " + "; ".join(why), *_names(why)))

    def _keep_still(self) -> None:
        writes, rewordings = self.checker.writes, self.checker.rewordings
        self._advance(STILL_SECONDS)
        reworded = self.checker.rewordings - rewordings
        # Why something waits may be said anew as faults of nodes fade from memory; not for ever.
        if self.checker.writes - reworded != writes or reworded > REWORDINGS_MAX:
            last = next(e for e in reversed(self.trace.last(1000)) if e.what == "write")
            why = f"it was at rest, and then something was written: {last}"
            raise self._failure(Violation("I9", why, last.subject))
        for one in self.orchestrators:
            if one.manager is not None:
                self.checker.buried(one.name, one.manager)
        for invariant, message, subject in wrong(self):
            raise self._failure(Violation(invariant, message, subject))
        self._advance(0)

    def wait(self, is_true: Callable[[], bool], *, seconds_max: float) -> float:
        """Let time pass in small steps until something is true; returns how long it took."""
        began = self.now
        while not is_true():
            if self.now - began > seconds_max:
                raise TimeoutError(f"not true within {seconds_max} simulated seconds")
            self._advance(0.1)
        return self.now - began

    def _advance(self, seconds: float) -> None:
        self.loop.advance(seconds)
        if self.violation is not None:
            raise self._failure(self.violation)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work, context=self.context)
        self.loop.run_until(task.done)
        task.result()

    def _end(self) -> None:
        """Let everybody go, without a word."""
        for orchestrator in self.orchestrators:
            orchestrator.kill()
        for machine in self.machines:
            machine.kill()
        self.loop.run_until_idle()
        self.loop.errors.clear()

    def _failure(self, violation: Violation) -> Failure:
        return Failure(self, violation)


class _Bugs(logging.Handler):
    """Takes each logged exception for a bug: errors that are meant carry no traceback."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            if isinstance(error, Violation):
                return
            text = logging.Formatter().formatException(record.exc_info)
            self._world.fail(Violation("bug", f"{record.getMessage()}: {error!r}\n{text}"))


class _bugs_count:
    """While it is entered, logged exceptions are violations, and logs cost nothing."""

    def __init__(self, world: World) -> None:
        self._handler = _Bugs(world)
        self._root = logging.getLogger()

    def __enter__(self) -> None:
        self._level = self._root.level
        self._root.setLevel(logging.ERROR)
        self._root.addHandler(self._handler)  # also keeps errors that are no bugs off the terminal

    def __exit__(self, *_: object) -> None:
        self._root.removeHandler(self._handler)
        self._root.setLevel(self._level)


@contextmanager
def _few_collections() -> Iterator[None]:
    """A world makes much garbage and ends soon: looking for it often costs a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _names(why: list[str]) -> list[str]:
    return [word for text in why[:3] for word in text.split()[:4] if "/" in word or "-" in word]


def _describe(world: World, violation: Violation) -> str:
    faults = f" --faults '{world.asked_faults}'" if world.asked_faults is not None else ""
    lines = [
        f"seed {world.seed} at {world.failed_at or world.now:.3f} s of simulated time",
        f"{violation}",
        f"faults: {world.faults}",
    ]
    subjects = tuple(subject.rpartition("/")[2] for subject in violation.subjects)
    about = world.trace.about(subjects) if any(subjects) else world.trace.last()
    lines += ["last events of what is concerned:", *(f"  {event}" for event in about)]
    lines.append(f"run it again: python -m tests.simulation --seed {world.seed}{faults}")
    return "\n".join(lines)
