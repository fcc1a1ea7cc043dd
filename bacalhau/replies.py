"""What the API answers beside the objects themselves; shared by the server and its clients.

Unknown fields are ignored on reading, so that an older client understands a newer server.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from bacalhau_api.base import Model, Timestamp
from bacalhau_api.meta import Waiting
from bacalhau_api.plans import InventoryEntry
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.execution import Outputs
from bacalhau_api.v1.job import Job, SpecConfig, Verdict
from bacalhau_api.v1.node import Node


class Reply(Model):
    """The base of all answers."""

    model_config = ConfigDict(extra="ignore")


class ProblemModel(Reply):
    """One thing wrong with an input; `field` is a path such as `spec.tasks[0].engine.type`."""

    field: str = ""
    message: str = ""
    value: str = ""
    hint: str = ""


class ErrorModel(Reply):
    """The body of every answer with a status of 400 or more.

    `field`, `value` and `hint` are those of the first problem, or empty.
    """

    reason: str = Field(description="One CamelCase word for programs, such as NotFound.")
    message: str
    field: str = ""
    value: str = ""
    hint: str = ""
    problems: tuple[ProblemModel, ...] = ()


class ListMeta(Reply):
    """About a list: the moment it shows, and how to get the next page."""

    resource_version: str = ""
    continue_: str = Field(default="", alias="continue")
    remaining_item_count: int = 0


class LinkAnswer(Reply):
    """A link by which anybody who has it can download, for so many seconds."""

    url: str
    seconds: int


class HistoryItem(Reply):
    """One change of an object. `object` is there if it was asked for and the object was not
    removed. `source`, `commit` and `by` are there where this change said where it comes from;
    `declared` if it changed what users say of the object (its spec or labels)."""

    revision: int
    time: Timestamp
    uid: str = ""
    actor: str
    reason: str
    message: str = ""
    phase: str = ""
    removed: bool = False
    generation: int = 0
    declared: bool = False
    source: str = ""
    commit: str = ""
    by: str = ""
    object: dict[str, Any] | None = None


class HistoryList(Reply):
    """The newest changes of one object, oldest first."""

    items: tuple[HistoryItem, ...] = ()


class Deleted(Reply):
    """The answer to a delete. `pending` names the finalizers that still hold the object."""

    kind: str
    name: str
    deleted: bool
    pending: tuple[str, ...] = ()


class JobApplied(Reply):
    """The answer to creating or applying a job."""

    outcome: str = Field(description="`created`, `configured` or `unchanged`.")
    warnings: tuple[str, ...] = ()
    job: Job


class NodeApplied(Reply):
    """The answer to applying a node."""

    outcome: str = Field(description="`configured` or `unchanged`.")
    warnings: tuple[str, ...] = ()
    node: Node


class ResultItem(Reply):
    """One accepted result. `outputs` are totals; the files are listed by the execution's
    `outputs`. `location` is where a publisher brought them, if it did."""

    slot: str
    partition: int = 0
    execution: str
    execution_uid: str
    node: str
    reachable: bool = True
    exit_code: int | None = None
    outputs: Outputs | None = None
    publication: str = ""
    location: SpecConfig | None = None


class Results(Reply):
    """The accepted results of one generation of a job, in the order of its slots."""

    job: str
    uid: str
    generation: int
    slots: int
    items: tuple[ResultItem, ...] = ()


class LogRecord(Reply):
    """One line of a log answer. `text` is output as it was written, newlines included and not cut
    at line ends; `notice` tells something beside the output, with a `reason` (such as `NodeAway`) if
    a log could not be read; `error` ends a broken answer, `end` a complete one. `offset` is where to
    go on from, in reading this execution's log again."""

    execution: str = ""
    slot: str = ""
    attempt: int = 0
    stream: str = Field(default="", description="`stdout` or `stderr`.")
    text: str = ""
    time: Timestamp | None = None
    offset: int | None = None
    notice: str = ""
    reason: str = ""
    error: ErrorModel | None = None
    end: bool = False


class SlotWords(Reply):
    """How one slot of a job stands."""

    slot: str
    state: str
    execution: str = ""
    node: str = ""
    attempts: int = 0
    message: str = ""


class RuleWords(Reply):
    """What one placement rule says of a node and a job."""

    rule: str
    ok: bool
    message: str
    remedy: str = ""


class Explanation(Reply):
    """Everything there is to say about one object, most important first.

    `headline` is one sentence; `because` are further facts, `remedies` what would change it.
    `slots` lists those that are not done first, at most 50 of them.
    """

    kind: str
    namespace: str = ""
    name: str
    phase: str = ""
    headline: str
    waiting: Waiting | None = None
    because: tuple[str, ...] = ()
    remedies: tuple[str, ...] = ()
    slots: tuple[SlotWords, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    rules: tuple[RuleWords, ...] = Field(default=(), description="Of one job and one node.")


class DocumentText(Model):
    """The text of a file with manifests: YAML or JSON, several documents allowed."""

    text: str
    source: str = Field(default="", max_length=1024)


class SetRequest(Model):
    """A set of documents, to be planned or applied together.

    `namespace` is for documents that name none. With an `owner`, such as `source/prod`,
    `inventory` is what it applied before (as the last answer to apply gave it), and with `prune`
    what is not declared any more is deleted. For apply: `token` is that of the plan which is to
    come true; `anyPlace` allows other nodes than planned.
    """

    documents: tuple[DocumentText, ...] = Field(default=(), max_length=1000)
    namespace: str = ""
    owner: str = Field(default="", max_length=256)
    inventory: tuple[InventoryEntry, ...] = ()
    prune: bool = False
    provenance: Provenance = Provenance()
    token: str = ""
    any_place: bool = False


class SimulateRequest(Model):
    """What is taken away: `node/NAME`."""

    without: tuple[str, ...] = Field(min_length=1, max_length=100)


class FieldDifference(Reply):
    """One field that differs; null: it is absent there. `runs`: it affects execution."""

    field: str
    old: Any = None
    new: Any = None
    runs: bool = False


class RevisionDiff(Reply):
    """What differs between two revisions of an object."""

    kind: str
    namespace: str = ""
    name: str
    from_: int = Field(alias="from")
    to: int
    fields: tuple[FieldDifference, ...] = ()


class RollbackRequest(Model):
    """`to` is a revision of the object's history, or `gN`: the newest of generation N."""

    to: str = Field(max_length=32)
    message: str = Field(default="", max_length=1024)


class RolledBack(Reply):
    """`generation` is the one that runs the old spec now."""

    kind: str
    namespace: str = ""
    name: str
    outcome: str
    revision: int
    generation: int
    warnings: tuple[str, ...] = ()


class RerunRequest(Model):
    """`nonce` makes asking twice the same as asking once; absent, each request runs it again."""

    nonce: str = Field(default="", max_length=64)
    failed: bool = Field(
        default=False,
        description="Only the slots that hold no result, in the same generation: with the same "
        "pinned inputs, beside the results that there are.",
    )


class LogResume(Model):
    """How far an earlier read of a job's logs came: the last `offset` of each execution's records.
    Executions that are not in it are read from the start, or as `tail` says."""

    offsets: dict[str, Annotated[int, Field(ge=0, le=2**62)]] = Field(max_length=20_000)


class StopRequest(Model):
    """Why, for the history."""

    message: str = Field(default="", max_length=1024)


class JoinRequest(Model):
    """A machine asks to become a node. `publicKey` is the NKey it will sign in with."""

    token: str = Field(max_length=256)
    node: str = Field(max_length=256)
    public_key: str = Field(max_length=256)


class JoinAnswer(Reply):
    """Where to connect, and whether an operator has yet to approve."""

    node: str
    nats_url: str
    is_approved: bool


class TokenRequest(Model):
    """`node` limits the token to one name."""

    node: str = Field(default="", max_length=256)
    ttl_seconds: int = 3600


class TokenAnswer(Reply):
    """The token, shown this once."""

    token: str
    ttl_seconds: int


class Health(Reply):
    """The server is there."""

    status: str = "ok"


class Version(Reply):
    """What runs on the server."""

    version: str
    python: str
    os: str
    arch: str
    api: str = "bacalhau.org/v1"
