"""What the parts of one agent share: the node's plugs, limits and places, and who it is."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bacalhau_api.meta import DEFAULT_NAMESPACE
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.node import Capability, HeldInput
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.admission import Offers, Policy
from bacalhau_controllers.runner.capacity import Allocator
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.guard import GuardedEngine, plug_capability
from bacalhau_controllers.runner.ledger import Book
from bacalhau_controllers.runner.outbox import Room
from bacalhau_controllers.runner.ports import (
    Inventory,
    Layout,
    Probe,
    Publisher,
    Storage,
    Workspace,
)
from bacalhau_controllers.runner.state import Instant, Limits


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is told about its node.

    `boot` names the present boot of the machine: moments of `clock.monotonic` are compared only
    within one, so the clock must go on through restarts of the agent and through suspend.
    Seconds, bytes and counts are as the names say. `retention_*` bound the outputs of finished
    executions whose reports are stored; 0 keeps them until the orchestrator lets go.
    `outbox_bytes_max` bounds what has yet to be handed over (see `runner.outbox`); 0 is no bound.
    """

    boot: str
    policy: Policy
    probes: tuple[Probe, ...] = ()
    version: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    local_paths: tuple[str, ...] = ()
    limits: Limits = Limits()  # noqa: RUF009 frozen
    output_bytes_max: int = 64 * 1024 * 1024
    prepares_max: int = 4
    fetches_max: int = 4
    starts_max: int = 4
    stops_max: int = 16
    collects_max: int = 2
    cleans_max: int = 2
    publishes_max: int = 2
    publish_try_seconds: float = 6 * 3600.0
    publish_seconds_max: float = 7 * 86400.0
    publish_retry_seconds: float = 2.0
    publish_retry_seconds_max: float = 300.0
    request_seconds: float = 30.0
    health_seconds: float = 10.0
    progress_seconds: float = 5.0
    """Between two words on how far inputs are."""
    inventory_seconds: float = 5.0
    """Between two looks at which inputs are here; each change of them is told."""
    sweep_seconds: float = 60.0
    tidy_seconds: float = 300.0
    retention_seconds: float = 7 * 86400.0
    retention_bytes: int = 0
    outbox_bytes_max: int = 0
    calm_seconds: float = 30.0
    """How long the ledger counts as full after a commit was refused for want of room."""
    flush_seconds: float = 0.05
    """How long progress that nothing depends on may wait to be written together with more."""


@dataclass(slots=True)
class Slots:
    """How much of each kind goes on at a time on this node."""

    prepares: asyncio.Semaphore
    stops: asyncio.Semaphore
    collects: asyncio.Semaphore
    cleans: asyncio.Semaphore
    publishes: asyncio.Semaphore


@dataclass(slots=True)
class Site:
    """One node, as its agent's parts see it."""

    node: str
    clock: Clock
    settings: AgentSettings
    engines: Mapping[str, GuardedEngine]
    storages: Mapping[str, Storage]
    publishers: Mapping[str, Publisher]
    workspace: Workspace
    writer: GroupCommit
    allocator: Allocator
    slots: Slots
    room: Room
    inventory: Inventory | None = None
    held_inputs: tuple[HeldInput, ...] = ()
    storage_capabilities: dict[str, Capability] = field(default_factory=dict)
    publisher_capabilities: dict[str, Capability] = field(default_factory=dict)

    @property
    def limits(self) -> Limits:
        """Shorthand."""
        return self.settings.limits

    @property
    def policy(self) -> Policy:
        """Shorthand."""
        return self.settings.policy

    @property
    def book(self) -> Book:
        """What the ledger holds. Changed by `writer` only."""
        return self.writer.book

    def now(self) -> Instant:
        """The present moment, by both clocks."""
        return Instant(wall=self.clock.now(), mono=self.clock.monotonic(), boot=self.settings.boot)

    def layout(self, execution: Execution) -> Layout:
        """Where an execution's things lie."""
        return self.workspace.layout(
            execution.metadata.namespace or DEFAULT_NAMESPACE, execution.name
        )

    def offers(self) -> Offers:
        """The plugs, as last heard of."""
        return Offers(
            engines={name: engine.capability for name, engine in self.engines.items()},
            storages=self.storage_capabilities,
            publishers=self.publisher_capabilities,
        )

    async def check_plugs(self) -> None:
        """Ask all plugs for their health, at the same time."""
        await asyncio.gather(*(engine.check() for engine in self.engines.values()))
        storages = await _capabilities(self.storages)
        publishers = await _capabilities(self.publishers)
        self.storage_capabilities = {one.name: one for one in storages}
        self.publisher_capabilities = {one.name: one for one in publishers}


async def _capabilities(
    plugs: Mapping[str, Storage] | Mapping[str, Publisher],
) -> Sequence[Capability]:
    return await asyncio.gather(*(plug_capability(name, plug) for name, plug in plugs.items()))


def make_slots(settings: AgentSettings) -> Slots:
    """The bounds of one agent."""
    return Slots(
        prepares=asyncio.Semaphore(settings.prepares_max),
        stops=asyncio.Semaphore(settings.stops_max),
        collects=asyncio.Semaphore(settings.collects_max),
        cleans=asyncio.Semaphore(settings.cleans_max),
        publishes=asyncio.Semaphore(settings.publishes_max),
    )
