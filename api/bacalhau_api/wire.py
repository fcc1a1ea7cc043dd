"""The messages between a node and the orchestrator. JSON; every one names its node and session.

A node has no access to the store. It sends three requests, each answered:

    Hello  -> Welcome | Refused      on every (re)connect: who am I, what do I still know
    Facts  -> Ack                    reports, until acknowledged as stored
    Beat   -> BeatReply              liveness, every few seconds

The orchestrator sends requests to the node's own subject: `Changes` (assignments after the
welcome's full list, numbered without gaps within a session), log and result reads.

A reply can be steered by a hostile node to another node's subject (NATS does not check replies),
so a node drops every message that does not carry its own name and the secret session id that
it chose in its hello.
"""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import NAME_LENGTH_MAX
from bacalhau_api.v1.execution import (
    Execution,
    OutputFile,
    Publication,
    PublicationReport,
    Report,
)
from bacalhau_api.v1.manifest import ManifestSpec
from bacalhau_api.v1.node import NodeInfo

PROTOCOL_VERSION = 1
OBJECT_NAME_LENGTH_MAX = 4 * NAME_LENGTH_MAX
"""Of any object: derived names hold up to two that users gave, and numbers."""
UID_LENGTH_MAX = 64

# A node may write what it likes; what it names is looked up, and kept in memory for the next time.
_Namespace = Annotated[str, Field(max_length=NAME_LENGTH_MAX)]
_ObjectName = Annotated[str, Field(max_length=OBJECT_NAME_LENGTH_MAX)]
_Uid = Annotated[str, Field(max_length=UID_LENGTH_MAX)]
_DIGEST = re.compile("sha256:[0-9a-f]{64}")


def _check_digest(value: str) -> str:
    if not _DIGEST.fullmatch(value):
        raise ValueError("a digest is sha256: and 64 hex digits")
    return value


def _check_manifest(spec: ManifestSpec) -> ManifestSpec:
    _check_digest(spec.digest)
    return spec


_Digest = Annotated[str, AfterValidator(_check_digest)]


class Fact(Model):
    """One report on its way to the orchestrator. Exactly one of the two reports is set.

    `seq` grows by one for each fact of an incarnation; `namespace`, `name` and `uid` are those of
    the Execution or Publication it speaks of.
    """

    seq: int
    namespace: _Namespace
    name: _ObjectName
    uid: _Uid
    execution: Report | None = None
    publication: PublicationReport | None = None


class Known(Model):
    """What a node holds about one execution, in its hello: enough to spot what nobody asked for."""

    namespace: _Namespace
    name: _ObjectName
    uid: _Uid
    is_final: bool = False


class Hello(Model):
    """A node introduces itself. `session` is random, chosen by the node for this connection."""

    protocol: int = PROTOCOL_VERSION
    node: str
    session: str
    incarnation: str
    info: NodeInfo
    facts_acked: int = Field(default=0, description="Highest fact sequence known to be stored.")
    held: tuple[Known, ...] = ()


class Assignments(Model):
    """Executions and publications that a node is to act on, whole objects."""

    executions: tuple[Execution, ...] = ()
    publications: tuple[Publication, ...] = ()


class Gone(Model):
    """An object that is no longer assigned: stop, report nothing more, clean up."""

    kind: Literal["Execution", "Publication"]
    namespace: str
    name: str
    uid: str


class Welcome(Model):
    """The answer to a hello: the full list. What the node holds beyond it is to be stopped.

    A list too long for one message comes in parts; the node asks for part `next_part` with the
    same hello subject until it is None. `steps` gives, per execution uid, the step of the report
    that is stored, so that older facts in the outbox can be dropped. `list_id` names the list, the
    same in all its parts; beats repeat it.
    """

    node: str
    session: str
    is_approved: bool = True
    message: str = ""
    time: Timestamp
    beat_seconds: float = 5.0
    assignments: Assignments = Assignments()
    steps: dict[str, int] = Field(default_factory=dict)
    list_id: str = ""
    next_part: int | None = None


class WelcomePart(Model):
    """Asks for one more part of a welcome."""

    node: str
    session: str
    part: int


class Refused(Model):
    """The answer to a message that is not accepted; `again_seconds` says when to try again."""

    node: str
    session: str
    reason: str
    message: str
    again_seconds: float = 15.0


class FactBatch(Model):
    """Facts in sequence order, at most 500 and at most 512 KiB encoded."""

    node: str
    session: str
    incarnation: str
    facts: tuple[Fact, ...]


class Ack(Model):
    """All facts up to `seq` of this incarnation are stored (or were obsolete)."""

    node: str
    session: str
    seq: int


class Beat(Model):
    """I am alive. `changes_seen` is the number of the last Changes message applied to the list
    `list_id`."""

    node: str
    session: str
    list_id: str = ""
    changes_seen: int
    info: NodeInfo | None = Field(default=None, description="Set when it changed.")
    facts_waiting: int = 0


class BeatReply(Model):
    """Heard. `hello_again` asks the node to introduce itself anew (a gap, a new leader)."""

    node: str
    session: str
    hello_again: bool = False


class PinRequest(Model):
    """About what input number `input` of an execution is pinned to.

    find    what is it? The reply's `manifest` is None if nothing is pinned yet.
    put     here is part `part` of a listing with that digest, packed, in base64
    make    pin it to the listing whose parts were put. The reply says what counts.
    read    give part `part` of the listing that counts
    """

    node: str
    session: str
    action: Literal["find", "put", "make", "read"]
    namespace: _Namespace
    execution: _ObjectName
    input: int = 0
    part: int = 0
    digest: _Digest | Literal[""] = ""
    data: str = ""
    manifest: Annotated[ManifestSpec, AfterValidator(_check_manifest)] | None = None


class PinReply(Model):
    """The answer to PinRequest."""

    node: str
    session: str
    manifest: ManifestSpec | None = None
    data: str = ""


class Changes(Model):
    """Assignments that changed. `number` grows by one within a session, from 1; a gap means that
    a message was lost, and the node says hello again."""

    node: str
    session: str
    number: int
    assignments: Assignments = Assignments()
    gone: tuple[Gone, ...] = ()


class Applied(Model):
    """The node's answer to Changes, once they are in its ledger."""

    node: str
    session: str
    number: int


class LogRead(Model):
    """Reads from one execution's log. `offset` is a position given by an earlier answer, 0 the
    start; None with `tail_lines` starts that many lines before the end. Waits up to
    `wait_seconds` for something new."""

    node: str
    session: str
    namespace: str
    execution: str
    stream: Literal["stdout", "stderr", "all"] = "all"
    offset: int | None = 0
    tail_lines: int | None = None
    size_bytes_max: int = 256 * 1024
    wait_seconds: float = 0.0


class LogPiece(Model):
    """A piece of output as it was written, newlines included; not cut at line ends."""

    stream: Literal["stdout", "stderr"]
    text: str
    time: Timestamp | None = None


class LogChunk(Model):
    """The answer to LogRead. `next_offset` continues; `is_end` says that no more will come."""

    pieces: tuple[LogPiece, ...] = ()
    next_offset: int = 0
    is_end: bool = False
    error: str = ""


class OutputsList(Model):
    """Asks for the list of an execution's output files, `after` the given path, for paging."""

    node: str
    session: str
    namespace: str
    execution: str
    after: str = ""


class OutputsPage(Model):
    """The answer to OutputsList, sorted by path; `is_last` closes the list."""

    files: tuple[OutputFile, ...] = ()
    is_last: bool = True
    error: str = ""


class OutputRead(Model):
    """Reads a piece of one output file. Answered with the raw bytes, or with an error in the
    `Error` header."""

    node: str
    session: str
    namespace: str
    execution: str
    path: str
    offset: int = 0
    size_bytes_max: int = 256 * 1024
