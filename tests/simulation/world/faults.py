"""What can go wrong, how often, and which of it is switched on.

A `Fault` is one kind of trouble. Its rate is either a *chance* (per message, write or boundary) or a
*frequency* (happenings per simulated minute, over the whole world). A seed usually draws a subset
with rates of its own: a run in which everything fails at once explores less than many in which a
few things fail often.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Self


class Fault(StrEnum):
    """One kind of trouble."""

    # The store, as one orchestrator sees it. Chances.
    STORE_REFUSES = "store-refuses"  # nothing was written
    STORE_LOSES_ANSWER = "store-loses-answer"  # it was written
    STORE_LATE_WRITE = "store-late-write"  # the answer is lost, and the write still under way
    STORE_SLOW = "store-slow"
    WATCH_LAGS = "watch-lags"
    WATCH_SKIPS = "watch-skips"
    WATCH_BREAKS = "watch-breaks"
    WATCH_RESTARTS = "watch-restarts"
    LEASE_FAILS = "lease-fails"
    # The network between nodes and orchestrators. Chances.
    NET_LOSS = "net-loss"
    NET_DOUBLE = "net-double"
    NET_DELAY = "net-delay"
    # Happenings.
    STORE_OUTAGE = "store-outage"  # one orchestrator does not reach the store for a while
    PARTITION = "partition"
    ONE_WAY = "one-way"
    FLAPPING = "flapping"
    CRASH_ORCHESTRATOR = "crash-orchestrator"
    CRASH_NODE = "crash-node"
    REBOOT_NODE = "reboot-node"
    WIPE_NODE = "wipe-node"
    OLD_LEDGER = "old-ledger"
    CLONE_NODE = "clone-node"
    NODE_OFF = "node-off"
    DISK_FULL = "disk-full"
    ENGINE_HANGS = "engine-hangs"
    ENGINE_SILENT = "engine-silent"
    ENGINE_STOPS_FAIL = "engine-stops-fail"
    ENGINE_START_FAILS = "engine-start-fails"
    ENGINE_LOSES_RUN = "engine-loses-run"
    INPUT_FAILS = "input-fails"
    PUBLISH_FAILS = "publish-fails"
    COLLECT_FAILS = "collect-fails"
    CLOCK_STEP = "clock-step"
    # Chances, at each boundary that a process crosses.
    CRASH_AT_WRITE = "crash-at-write"  # before or after a write of an orchestrator
    CRASH_AT_LEDGER = "crash-at-ledger"  # before or after what an agent does to its world
    DISK_SLOW = "disk-slow"  # a write of a ledger takes long, some longer than a session
    # A property of the world: each party's clocks run at their own speed.
    CLOCK_DRIFT = "clock-drift"
    # What operators do to nodes. Happenings.
    OPERATOR = "operator"
    # A chance, at each write of a ledger: it may have been written or not, and the agent ends.
    FSYNC_FAILS = "fsync-fails"
    # A happening: one orchestrator sees nothing new for a while, and reads and writes all the same.
    WATCH_STALLS = "watch-stalls"


RATES: Mapping[Fault, float] = {
    Fault.STORE_REFUSES: 0.05,
    Fault.STORE_LOSES_ANSWER: 0.05,
    Fault.STORE_LATE_WRITE: 0.01,
    Fault.STORE_SLOW: 0.05,
    Fault.WATCH_LAGS: 0.05,
    Fault.WATCH_SKIPS: 0.05,
    Fault.WATCH_BREAKS: 0.003,
    Fault.WATCH_RESTARTS: 0.5,
    Fault.LEASE_FAILS: 0.1,
    Fault.NET_LOSS: 0.05,
    Fault.NET_DOUBLE: 0.05,
    Fault.NET_DELAY: 0.1,
    Fault.STORE_OUTAGE: 0.5,
    Fault.PARTITION: 2.0,
    Fault.ONE_WAY: 1.0,
    Fault.FLAPPING: 0.5,
    Fault.CRASH_ORCHESTRATOR: 1.5,
    Fault.CRASH_NODE: 2.0,
    Fault.REBOOT_NODE: 1.0,
    Fault.WIPE_NODE: 0.4,
    Fault.OLD_LEDGER: 0.4,
    Fault.CLONE_NODE: 0.3,
    Fault.NODE_OFF: 1.0,
    Fault.DISK_FULL: 0.5,
    Fault.ENGINE_HANGS: 0.5,
    Fault.ENGINE_SILENT: 0.4,
    Fault.ENGINE_STOPS_FAIL: 0.5,
    Fault.ENGINE_START_FAILS: 0.5,
    Fault.ENGINE_LOSES_RUN: 1.0,
    Fault.INPUT_FAILS: 0.5,
    Fault.PUBLISH_FAILS: 0.5,
    Fault.COLLECT_FAILS: 0.5,
    Fault.CLOCK_STEP: 1.0,
    Fault.CRASH_AT_WRITE: 0.01,
    Fault.CRASH_AT_LEDGER: 0.004,
    Fault.DISK_SLOW: 0.1,
    Fault.CLOCK_DRIFT: 0.003,
    Fault.OPERATOR: 1.5,
    Fault.FSYNC_FAILS: 0.004,
    Fault.WATCH_STALLS: 1.0,
}

TAMPERING = frozenset({Fault.WIPE_NODE, Fault.OLD_LEDGER, Fault.CLONE_NODE})
"""Faults that break the promise that a node remembers what it did."""


@dataclass(frozen=True)
class Faults:
    """Which faults there are, and how much of each. A fault without a rate does not happen."""

    rates: Mapping[Fault, float] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Self:
        """A world in which everything works."""
        return cls({})

    @classmethod
    def all(cls) -> Self:
        """Everything at its usual rate."""
        return cls(dict(RATES))

    @classmethod
    def draw(cls, rng: Random) -> Self:
        """A subset, each with its own intensity."""
        density = rng.choice([0.15, 0.35, 0.6])
        rates: dict[Fault, float] = {}
        for fault, rate in RATES.items():
            dice, scale = rng.random(), rng.choice([0.5, 1.0, 1.0, 3.0])
            if dice < density:
                rates[fault] = rate * scale
        return cls(rates)

    @classmethod
    def of_seed(cls, seed: int) -> Self:
        """What a world of this seed draws."""
        return cls.draw(Random(Random(seed).getrandbits(64)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`a,b` is these at their usual rates, `a=0.5` one at another, `all` and `-c` all but c.

        Raises ValueError for a fault that does not exist.
        """
        rates: dict[Fault, float] = {}
        for word in filter(None, text.split(",")):
            name, _, rate = word.partition("=")
            if name == "none":
                rates = {}
            elif name == "all":
                rates |= RATES
            elif name.startswith("-"):
                rates.pop(Fault(name[1:]), None)
            else:
                rates[Fault(name)] = float(rate) if rate else RATES[Fault(name)]
        return cls(rates)

    def rate(self, fault: Fault) -> float:
        """The rate of a fault; 0 if it is switched off."""
        return self.rates.get(fault, 0.0)

    def only(self, faults: Iterable[Fault]) -> "Faults":
        """Those of them that are on here."""
        kept = set(faults)
        return Faults({fault: rate for fault, rate in self.rates.items() if fault in kept})

    def __str__(self) -> str:
        if not self.rates:
            return "none"
        return ",".join(f"{fault}={rate:g}" for fault, rate in sorted(self.rates.items()))
