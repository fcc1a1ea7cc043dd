"""Every request the client makes, as plain data, and what its answer is turned into.

No HTTP here: `sync` and `aio` send calls, each in its own way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from types import GenericAlias
from typing import Any, Generic, TypeVar

from pydantic import ValidationError, create_model

from bacalhau.client.errors import unreadable
from bacalhau.kinds import API_ROOT, EXECUTION, JOB, NODE, PUBLICATION, KindNames, find_kind
from bacalhau.replies import (
    Deleted,
    Explanation,
    HistoryList,
    JobApplied,
    JoinAnswer,
    JoinRequest,
    LinkAnswer,
    ListMeta,
    LogResume,
    NodeApplied,
    Reply,
    RerunRequest,
    Results,
    StopRequest,
    TokenAnswer,
    TokenRequest,
    Version,
)
from bacalhau_api.base import Model
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import DEFAULT_NAMESPACE, Resource
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_api.wire import OutputsPage

T = TypeVar("T")
M = TypeVar("M", bound=Model)
R = TypeVar("R", bound=Resource)

JSON = "application/json"
YAML = "application/yaml"
PAGE_ITEMS = 1000


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `parse` makes the result of a good answer's body."""

    method: str
    path: str
    parse: Callable[[bytes], T]
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    content_type: str = ""
    # Whether sending it again after a broken connection does no harm.
    is_repeatable: bool = False


@dataclass(frozen=True, slots=True)
class Page(Generic[R]):
    """A page of objects; `token` gets the next one, empty at the end."""

    items: tuple[R, ...]
    resource_version: str
    token: str


def tolerant(model: type[M]) -> Callable[[bytes], M]:
    """A parser of answers that looks away from fields which a newer server may have added."""

    def parse(body: bytes) -> M:
        try:
            return model.model_validate_json(body, extra="ignore")
        except ValidationError as error:
            raise unreadable("answer", error) from error

    return parse


def names_of(kind: type[Resource]) -> KindNames:
    """The names of a model's kind."""
    names = find_kind(kind.model_fields["kind"].default)
    assert names is not None, f"{kind.__name__} is not served by the API"
    return names


def get(kind: type[R], name: str, namespace: str) -> Call[R]:
    """One object."""
    path = names_of(kind).path(namespace, name)
    return Call("GET", path, tolerant(kind), is_repeatable=True)


@dataclass(frozen=True, slots=True)
class Filter:
    """What a list or watch is about. `namespace` None means all."""

    namespace: str | None = DEFAULT_NAMESPACE
    labels: str = ""
    fields: str = ""

    def params(self) -> dict[str, str]:
        """The query parameters."""
        given = {"labelSelector": self.labels, "fieldSelector": self.fields}
        return {key: value for key, value in given.items() if value}


@lru_cache(maxsize=16)
def _list_model(kind: type[Resource]) -> type[Model]:
    items: Any = (GenericAlias(tuple, (kind, ...)), ())
    meta: Any = (ListMeta, ListMeta())
    return create_model("ObjectList", __base__=Reply, metadata=meta, items=items)


def page(
    kind: type[R], wanted: Filter, *, sort: str = "", limit: int | None = None, token: str = ""
) -> Call[Page[R]]:
    """One page of objects."""
    decode = tolerant(_list_model(kind))

    def parse(body: bytes) -> Page[R]:
        answer: Any = decode(body)
        return Page(answer.items, answer.metadata.resource_version, answer.metadata.continue_)

    params = wanted.params() | {"limit": str(limit or PAGE_ITEMS)}
    params |= {"sort": sort} if sort else {}
    params |= {"continue": token} if token else {}
    path = names_of(kind).path(wanted.namespace)
    return Call("GET", path, parse, params, is_repeatable=True)


def raw(path: str, params: Mapping[str, str] | None = None) -> Call[bytes]:
    """Any answer as it came."""
    return Call("GET", path, lambda body: body, params or {}, is_repeatable=True)


def manifest_of(job: Job | str | bytes) -> tuple[bytes, str]:
    """A job, or the text of a job file, as a body and its content type."""
    if isinstance(job, Job):
        return job.encode(), JSON
    body = job.encode() if isinstance(job, str) else job
    return body, JSON if body.lstrip()[:1] == b"{" else YAML


def create(job: Job | str | bytes, namespace: str | None) -> Call[JobApplied]:
    """Create a job that does not exist yet."""
    body, content_type = manifest_of(job)
    path = JOB.path(namespace)
    return Call("POST", path, tolerant(JobApplied), body=body, content_type=content_type)


def _origin(origin: Provenance | None) -> dict[str, str]:
    return {k: v for k, v in origin.wire().items() if v} if origin else {}


def apply_job(job: Job, *, dry_run: bool, origin: Provenance | None = None) -> Call[JobApplied]:
    """Create or change a job."""
    if not job.name:
        hint = "set metadata.name, or create it instead: then the server names it"
        raise InvalidError([Problem("metadata.name", "is missing", hint=hint)])
    path = JOB.path(job.ref.namespace, job.name)
    params = _origin(origin) | ({"dryRun": "true"} if dry_run else {})
    return Call("PUT", path, tolerant(JobApplied), params, job.encode(), JSON, is_repeatable=True)


def apply_node(node: Node, *, dry_run: bool, origin: Provenance | None = None) -> Call[NodeApplied]:
    """Change what operators say of a node."""
    params = _origin(origin) | ({"dryRun": "true"} if dry_run else {})
    # All that was given, also where it is the default: `unschedulable: false` is a wish, too.
    body = node.model_dump_json(by_alias=True, exclude_unset=True).encode()
    path = NODE.path(name=node.name)
    return Call("PUT", path, tolerant(NodeApplied), params, body, JSON, is_repeatable=True)


def delete(names: KindNames, name: str, namespace: str, *, force: bool) -> Call[Deleted]:
    """Delete an object."""
    params = {"force": "true"} if force else {}
    return Call("DELETE", names.path(namespace, name), tolerant(Deleted), params)


def job_verb(verb: str, name: str, namespace: str, body: Model | None = None) -> Call[Job]:
    """Stop, rerun, suspend, resume."""
    text = body.encode() if body else None
    path = JOB.path(namespace, name, verb)
    # A rerun is only harmless twice if it carries a nonce.
    is_repeatable = not isinstance(body, RerunRequest) or bool(body.nonce)
    kind = JSON if body else ""
    return Call("POST", path, tolerant(Job), {}, text, kind, is_repeatable)


def stop(name: str, namespace: str, message: str) -> Call[Job]:
    """Stop a job."""
    return job_verb("stop", name, namespace, StopRequest(message=message))


def rerun(name: str, namespace: str, nonce: str, *, failed: bool) -> Call[Job]:
    """Run a job again."""
    return job_verb("rerun", name, namespace, RerunRequest(nonce=nonce, failed=failed))


def node_verb(verb: str, name: str) -> Call[Node]:
    """Approve, reject, cordon, uncordon, drain."""
    return Call("POST", NODE.path(name=name, sub=verb), tolerant(Node), is_repeatable=True)


def history(
    names: KindNames, name: str, namespace: str, *, limit: int, objects: bool
) -> Call[HistoryList]:
    """What happened to an object."""
    params = {"limit": str(limit)} | ({"objects": "true"} if objects else {})
    path = names.path(namespace, name, "history")
    return Call("GET", path, tolerant(HistoryList), params, is_repeatable=True)


def explain(names: KindNames, name: str, namespace: str) -> Call[Explanation]:
    """Why an object is as it is."""
    path = names.path(namespace, name, "explain")
    return Call("GET", path, tolerant(Explanation), is_repeatable=True)


def results(name: str, namespace: str, generation: int | None) -> Call[Results]:
    """A job's accepted results."""
    params = {"generation": str(generation)} if generation else {}
    path = JOB.path(namespace, name, "results")
    return Call("GET", path, tolerant(Results), params, is_repeatable=True)


def link(publication: str, namespace: str, seconds: int) -> Call[LinkAnswer]:
    """A link to a published archive. Made anew each time, and kept nowhere."""
    path = PUBLICATION.path(namespace, publication, "link")
    params = {"seconds": str(seconds)}
    return Call("GET", path, tolerant(LinkAnswer), params, is_repeatable=True)


def outputs(execution: str, namespace: str, after: str) -> Call[OutputsPage]:
    """A page of an execution's files."""
    path = EXECUTION.path(namespace, execution, "outputs")
    params = {"after": after} if after else {}
    decode = tolerant(OutputsPage)

    def parse(body: bytes) -> OutputsPage:
        answer = decode(body)
        # Who reads on from the last path would otherwise never come to an end.
        if any(a >= b for a, b in pairwise((after, *(file.path for file in answer.files)))):
            raise unreadable("list of outputs", ValueError("it is out of order"))
        return answer

    return Call("GET", path, parse, params, is_repeatable=True)


def log_params(*, follow: bool, tail: int | None, stream: str, offset: int) -> dict[str, str]:
    """The query of a log read."""
    params = {"stream": stream}
    params |= {"follow": "true"} if follow else {}
    params |= {"tail": str(tail)} if tail is not None else {}
    params |= {"offset": str(offset)} if offset else {}
    return params


def can_resume(server: str, *, is_job: bool) -> bool:
    """Whether a log can be read on over a new connection. A node's own socket knows no positions
    in the logs of a job."""
    return not (is_job and server.startswith("unix:"))


def read_log(
    path: str, params: Mapping[str, str], offsets: Mapping[str, int], *, is_job: bool
) -> Call[bytes]:
    """A log read, from its start or from where an earlier one was."""
    if not offsets:
        return raw(path, params)
    if is_job:
        body = LogResume(offsets=dict(offsets)).encode()
        return Call("POST", path, lambda data: data, params, body, JSON)
    (offset,) = offsets.values()
    rest = {key: value for key, value in params.items() if key != "tail"}
    return raw(path, rest | {"offset": str(offset)})


def create_token(node: str, ttl_seconds: int) -> Call[TokenAnswer]:
    """A single-use token for a new node."""
    body = TokenRequest(node=node, ttl_seconds=ttl_seconds).encode()
    path = f"{API_ROOT}/tokens/join"
    return Call("POST", path, tolerant(TokenAnswer), body=body, content_type=JSON)


def join(token: str, node: str, public_key: str) -> Call[JoinAnswer]:
    """Become a node."""
    body = JoinRequest(token=token, node=node, public_key=public_key).encode()
    path = f"{API_ROOT}/nodes/join"
    return Call("POST", path, tolerant(JoinAnswer), body=body, content_type=JSON)


def version() -> Call[Version]:
    """What runs on the server."""
    return Call("GET", "/version", tolerant(Version), is_repeatable=True)
