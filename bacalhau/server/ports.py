"""What the API server is given: the state, a way to nodes, enrolment, and the few odds and ends.

Protocols only, and the bundle of them; the implementations live with whoever composes a server.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from bacalhau_api.v1.job import SpecConfig
from bacalhau_api.wire import LogChunk, OutputsPage
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.job import JobSettings
from bacalhau_controllers.state import State

LogStream = Literal["stdout", "stderr", "all"]


class NodeReader(Protocol):
    """Reads logs and outputs of executions from the node that has them.

    Every method raises UnavailableError while the node is away, NotFoundError where the node does
    not know the execution or the file.
    """

    async def read_log(
        self,
        node: str,
        namespace: str,
        execution: str,
        stream: LogStream,
        offset: int | None,
        tail_lines: int | None,
        wait_seconds: float,
    ) -> LogChunk:
        """A piece of an execution's log; see `bacalhau_api.wire.LogRead` for the meaning of each
        argument. Returns early when there is something, empty after `wait_seconds`."""
        ...

    async def list_outputs(
        self, node: str, namespace: str, execution: str, after: str
    ) -> OutputsPage:
        """The output files whose path sorts behind `after`, in order, as many as fit a page."""
        ...

    async def read_output(
        self, node: str, namespace: str, execution: str, path: str, offset: int, size: int
    ) -> bytes:
        """At most `size` bytes of one output file from `offset`; empty at its end."""
        ...


class JoinReply(Protocol):
    """What a new node needs to connect."""

    @property
    def node(self) -> str:
        """The name under which it was enrolled."""
        ...

    @property
    def nats_url(self) -> str:
        """Where NATS is, for nodes."""
        ...

    @property
    def is_approved(self) -> bool:
        """False while an operator has yet to approve it."""
        ...


class Enrolment(Protocol):
    """Turns single-use tokens into nodes."""

    async def create_token(
        self, *, node: str = "", ttl_seconds: int = 3600, actor: str = "user"
    ) -> str:
        """A new token; with `node`, good for that name only."""
        ...

    async def join(self, token: str, node: str, public_key: str) -> JoinReply:
        """Enrol a node. Raises ForbiddenError, ConflictError or InvalidError."""
        ...


SignLink = Callable[[SpecConfig, int], Awaitable[str]]
"""Raises NotFoundError for what has no link, UnavailableError."""


def _no_gauges() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, slots=True)
class Services:
    """Everything behind the API.

    `gauges` is read for each scrape of /metrics; its keys are names of gauges without prefix, such
    as `work_queue_depth_job`. `is_ready` tells whether this process can serve beyond its cache.
    `job_settings` are those of the job reconciler, so that plans come true. `sign` makes a link by
    which anybody can download what lies at a location for so many seconds; None: links are not made.
    """

    state: State
    nodes: NodeReader
    enrolment: Enrolment
    clock: Clock
    ids: Ids
    version: str = ""
    gauges: Callable[[], Mapping[str, float]] = _no_gauges
    is_ready: Callable[[], bool] = lambda: True
    job_settings: JobSettings = field(default_factory=JobSettings)
    sign: SignLink | None = None
