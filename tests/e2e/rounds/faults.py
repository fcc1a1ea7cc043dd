"""What goes wrong with real processes: each fault takes hold of a station for a while and lets go.

Drawn from a seed, at random moments; two faults never work on the same process at the same time,
but any number of them at the same time on different ones.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from tests.e2e.cluster import ClusterError
from tests.e2e.rounds.containers import DockerProgram
from tests.e2e.rounds.fleet import Fleet, Station, empty, fill
from tests.e2e.rounds.lab import FAIR, Weather
from tests.support.dockerd import Dockerd

PAST_THE_LIMIT_SECONDS = (11.0, 16.0)
"""Longer than the disconnect policies of the jobs allow, with the time it takes to be noticed."""

Act = Callable[[Fleet, Station, float, Random], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault: what it does, whom it strikes, for how many seconds."""

    name: str
    act: Act
    on_hub: bool = False
    seconds: tuple[float, float] = (0.5, 8.0)


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault that is going to happen, `at` seconds after the begin of its round."""

    kind: Kind
    target: str
    at: float
    seconds: float
    seed: int

    def __str__(self) -> str:
        return f"{self.kind.name}@{self.target}+{self.at:.1f}/{self.seconds:.1f}"


async def _kill(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    station.kill()
    await asyncio.sleep(seconds)
    await station.start()


async def _kill_twice(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """Again just after it has come back, or while it does."""
    station.kill()
    starting = asyncio.create_task(station.start())
    await asyncio.sleep(min(seconds, rng.uniform(0.0, 1.5)))
    station.kill()
    with contextlib.suppress(ClusterError):
        await starting  # it tries again by itself
    await station.start()


async def _kill_nats(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    with contextlib.suppress(ClusterError, ProcessLookupError):
        os.kill(fleet.nats_pid(), signal.SIGKILL)


async def _kill_zygote(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    for pid in station.fork_servers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def _kill_all(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """Everything but the workloads."""
    with contextlib.suppress(ClusterError, ProcessLookupError):
        os.kill(fleet.nats_pid(), signal.SIGKILL)
    fleet.hub.kill()
    free = [edge for edge in fleet.edges.values() if not edge.busy.locked()]
    for edge in free:
        edge.kill()
    await asyncio.sleep(min(seconds, 3.0))
    await asyncio.gather(*(one.start() for one in (fleet.hub, *free)))


async def _pause(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    await _stopped([station.pid], seconds)


async def _pause_nats(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    with contextlib.suppress(ClusterError):
        await _stopped([fleet.nats_pid()], seconds)


async def _freeze(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """The whole machine: agent, engine, workloads."""
    await _stopped(fleet.all_pids(station), seconds)


async def _kill_engine(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """kill -9 of dockerd; the containers go on without it."""
    engine = _engine(fleet, station)
    await asyncio.to_thread(engine.kill)
    await asyncio.sleep(seconds)
    await asyncio.to_thread(engine.start)


async def _kill_engine_hard(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """The same, and the one that comes after it ends all that ran."""
    engine = _engine(fleet, station)
    await asyncio.to_thread(engine.kill)
    await asyncio.sleep(seconds)
    engine.config = {}
    await asyncio.to_thread(engine.start)


async def _kill_node(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    """Agent and engine at once, and again in any order."""
    engine = _engine(fleet, station)
    station.kill()
    await asyncio.to_thread(engine.kill)
    await asyncio.sleep(seconds)
    await asyncio.gather(station.start(), asyncio.to_thread(engine.start))


async def _pause_engine(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    engine = _engine(fleet, station)
    engine.pause()
    try:
        await asyncio.sleep(seconds)
    finally:
        engine.resume()


def _engine(fleet: Fleet, station: Station) -> Dockerd:
    assert isinstance(fleet.program, DockerProgram)
    return fleet.program.engines[station.name]


async def _stopped(pids: list[int], seconds: float) -> None:
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number is signal.SIGSTOP:
            await asyncio.sleep(seconds)


def _under(weather: Weather) -> Act:
    async def act(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
        station.party.set(weather)
        await asyncio.sleep(seconds)
        station.party.set(FAIR)

    return act


async def _flap(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    period = rng.choice([0.5, 1.0, 2.0])
    for _ in range(max(int(seconds / period / 2), 1)):
        station.party.set(Weather(up=False, down=False))
        await asyncio.sleep(period)
        station.party.set(FAIR)
        await asyncio.sleep(period)


async def _disk_full(fleet: Fleet, station: Station, seconds: float, rng: Random) -> None:
    await asyncio.to_thread(fill, station)
    await asyncio.sleep(seconds)
    empty(station)


_CUT = Weather(up=False, down=False)

KINDS: tuple[Kind, ...] = (
    Kind("kill-hub", _kill, on_hub=True, seconds=(0.0, 3.0)),
    Kind("kill-hub-twice", _kill_twice, on_hub=True, seconds=(0.0, 2.0)),
    Kind("kill-nats", _kill_nats, on_hub=True),
    Kind("kill-all", _kill_all, on_hub=True, seconds=(0.0, 3.0)),
    Kind("kill-agent", _kill, seconds=(0.0, 6.0)),
    Kind("kill-agent-twice", _kill_twice, seconds=(0.0, 3.0)),
    Kind("kill-agent-long", _kill, seconds=PAST_THE_LIMIT_SECONDS),
    Kind("kill-zygote", _kill_zygote),
    Kind("pause-hub", _pause, on_hub=True),
    Kind("pause-nats", _pause_nats, on_hub=True, seconds=(0.5, 6.0)),
    Kind("pause-agent", _pause),
    Kind("freeze-node", _freeze),
    Kind("cut", _under(_CUT)),
    Kind("cut-long", _under(_CUT), seconds=PAST_THE_LIMIT_SECONDS),
    Kind("cut-hub", _under(_CUT), on_hub=True),
    Kind("unplug", _under(Weather(is_plugged=False))),
    Kind("deaf", _under(Weather(down=False))),
    Kind("mute", _under(Weather(up=False))),
    Kind("flap", _flap),
    Kind("lossy", _under(Weather(loss_percent=30, delay_ms=100)), seconds=(2.0, 10.0)),
    Kind("slow", _under(Weather(kbit=64)), seconds=(2.0, 10.0)),
    Kind("slow-hub", _under(Weather(kbit=256)), on_hub=True, seconds=(2.0, 10.0)),
    Kind("disk-full", _disk_full, seconds=(1.0, 6.0)),
    Kind("disk-full-hub", _disk_full, on_hub=True, seconds=(1.0, 6.0)),
)


ENGINE_KINDS: tuple[Kind, ...] = (
    Kind("kill-engine", _kill_engine, seconds=(0.0, 4.0)),
    Kind("kill-engine-hard", _kill_engine_hard, seconds=(0.0, 2.0)),
    Kind("kill-node", _kill_node, seconds=(0.0, 4.0)),
    Kind("pause-engine", _pause_engine),
)
"""What befalls Docker Engines. It is drawn every other time where there are some."""

CUTS_RUNS: Final = frozenset({"disk-full", "kill-zygote", "kill-engine-hard"})
"""Faults that may end a run, or hide how it ended, so that it is right to run it again."""


def draw(fleet: Fleet, rng: Random, seconds: float) -> list[Planned]:
    """Some faults of a round, in order of time."""
    has_engines = isinstance(fleet.program, DockerProgram)
    found: list[Planned] = []
    for _ in range(rng.randint(2, 5)):
        kinds = ENGINE_KINDS if has_engines and rng.random() < 0.5 else KINDS
        kind = rng.choice(kinds)
        target = "hub" if kind.on_hub else rng.choice(sorted(fleet.edges))
        at, lasts = rng.uniform(0.0, seconds), rng.uniform(*kind.seconds)
        found.append(Planned(kind, target, at, lasts, rng.getrandbits(32)))
    return sorted(found, key=lambda one: one.at)


async def strike(fleet: Fleet, fault: Planned) -> None:
    """Wait for its moment, do it, and undo it."""
    await asyncio.sleep(fault.at)
    station = fleet.hub if fault.kind.on_hub else fleet.edges[fault.target]
    async with station.busy:
        if not station.is_up:
            return
        try:
            await fault.kind.act(fleet, station, fault.seconds, Random(fault.seed))
        finally:
            station.party.set(FAIR)
