"""The asynchronous client: the methods of `Client`, to be awaited."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx

from bacalhau.client import calls
from bacalhau.client.address import DEFAULT_SERVER, check_server, socket_of
from bacalhau.client.calls import Call, Filter, Page, names_of
from bacalhau.client.download import Downloaded
from bacalhau.client.errors import WaitTimeoutError, connection_error, error_from
from bacalhau.client.layout import Layout
from bacalhau.client.logposition import BACK, LOST, LogPosition, can_go_on
from bacalhau.client.review import AsyncReviews
from bacalhau.client.running import seconds_left, wait_for_run_async
from bacalhau.client.sync import Client
from bacalhau.client.waiting import (
    Backoff,
    EventReader,
    Goal,
    Lines,
    Waited,
    WatchUpdate,
    judge,
    log_record,
)
from bacalhau.kinds import EXECUTION, JOB
from bacalhau.localsocket import short_address
from bacalhau.replies import (
    Deleted,
    Explanation,
    HistoryItem,
    JobApplied,
    JoinAnswer,
    LinkAnswer,
    LogRecord,
    NodeApplied,
    Results,
    TokenAnswer,
    Version,
)
from bacalhau_api.errors import NotFoundError, TransientError
from bacalhau_api.meta import DEFAULT_NAMESPACE, Resource
from bacalhau_api.provenance import Provenance
from bacalhau_api.v1.execution import Execution, OutputFile
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node

T = TypeVar("T")
R = TypeVar("R", bound=Resource)

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
# The server says at least every 15 s that it is still there.
SILENCE_SECONDS = 45.0
TRIES_MAX = 3

_STREAMING = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, read=SILENCE_SECONDS)


class AsyncClient(AsyncReviews):
    """Talks to one server. Use it as an asynchronous context manager, or `close` it.

    `server` is such as `http://127.0.0.1:1234`, the default; `token` is asked for by servers that
    listen beyond loopback. All methods raise the errors of `bacalhau_api.errors`; UnavailableError
    where nobody answers.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, token: str = "") -> None:
        self.server = check_server(server)
        self._token = token
        headers = {"User-Agent": "bacalhau-python"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        path = socket_of(self.server)
        self._places = ExitStack()
        socket = self._places.enter_context(short_address(path)) if path else None
        self._http = httpx.AsyncClient(
            base_url="http://agent" if path else self.server,
            transport=httpx.AsyncHTTPTransport(uds=socket) if socket else None,
            headers=headers,
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            # A proxy of the environment is for the web, not for the cluster next door; and a
            # token is not to be replaced by what ~/.netrc has.
            trust_env=False,
        )

    async def close(self) -> None:
        """Let go of connections."""
        await self._http.aclose()
        self._places.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # Objects

    async def get(self, kind: type[R], name: str, namespace: str = DEFAULT_NAMESPACE) -> R:
        """One object. Raises NotFoundError."""
        return await self.send(calls.get(kind, name, namespace))

    async def page(
        self,
        kind: type[R],
        *,
        namespace: str | None = DEFAULT_NAMESPACE,
        labels: str = "",
        fields: str = "",
        sort: str = "",
        limit: int | None = None,
        token: str = "",
    ) -> Page[R]:
        """One page of objects; `token` is that of the page before. `namespace` None means all."""
        wanted = Filter(namespace, labels, fields)
        return await self.send(calls.page(kind, wanted, sort=sort, limit=limit, token=token))

    async def list(
        self,
        kind: type[R],
        *,
        namespace: str | None = DEFAULT_NAMESPACE,
        labels: str = "",
        fields: str = "",
        sort: str = "",
    ) -> AsyncIterator[R]:
        """All objects, page by page. `labels` is such as `team=data,!old`, `fields` such as
        `phase=Running,node=edge-1`, `sort` `name` or `created` or these with `-` in front."""
        wanted = Filter(namespace, labels, fields)
        token = ""
        while True:
            page = await self.send(calls.page(kind, wanted, sort=sort, token=token))
            for item in page.items:
                yield item
            token = page.token
            if not token:
                return

    async def apply(
        self, job: Job, *, dry_run: bool = False, origin: Provenance | None = None
    ) -> JobApplied:
        """Create a job, or change it to what is given. `origin` goes into the history."""
        return await self.send(calls.apply_job(job, dry_run=dry_run, origin=origin))

    async def create(self, job: Job | str | bytes, namespace: str | None = None) -> JobApplied:
        """Create a job from a Job or the text of a job file; one without a name is given one.
        Raises ConflictError if it exists."""
        return await self.send(calls.create(job, namespace))

    async def apply_node(
        self, node: Node, *, dry_run: bool = False, origin: Provenance | None = None
    ) -> NodeApplied:
        """Change a node's labels, annotations and the spec fields that are set."""
        return await self.send(calls.apply_node(node, dry_run=dry_run, origin=origin))

    async def delete(
        self,
        kind: type[Resource],
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        force: bool = False,
    ) -> Deleted:
        """Delete a job or a node; `force` does not wait for finalizers."""
        return await self.send(calls.delete(names_of(kind), name, namespace, force=force))

    async def history(
        self,
        kind: type[Resource],
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        limit: int = 100,
        objects: bool = False,
    ) -> tuple[HistoryItem, ...]:
        """The newest changes of an object, oldest first; `objects` adds it as it was."""
        call = calls.history(names_of(kind), name, namespace, limit=limit, objects=objects)
        return (await self.send(call)).items

    async def explain(
        self, kind: type[Resource], name: str, namespace: str = DEFAULT_NAMESPACE
    ) -> Explanation:
        """Why an object is as it is, what it waits for, what would help."""
        return await self.send(calls.explain(names_of(kind), name, namespace))

    # Jobs

    async def stop(
        self, name: str, namespace: str = DEFAULT_NAMESPACE, *, message: str = ""
    ) -> Job:
        """Stop the present generation of a job."""
        return await self.send(calls.stop(name, namespace, message))

    async def rerun(
        self,
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        nonce: str = "",
        failed: bool = False,
    ) -> Job:
        """Run a job again, or, with `failed`, only its slots that hold no result. The same nonce
        runs it once, however often it is sent."""
        return await self.send(calls.rerun(name, namespace, nonce, failed=failed))

    async def suspend(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Job:
        """Start nothing more of a job until it is resumed."""
        return await self.send(calls.job_verb("suspend", name, namespace))

    async def resume(self, name: str, namespace: str = DEFAULT_NAMESPACE) -> Job:
        """Let a suspended job go on."""
        return await self.send(calls.job_verb("resume", name, namespace))

    async def wait(
        self,
        name: str,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        goal: Goal = "complete",
        timeout_seconds: float | None = None,
        generation: int = 0,
        revision: int = 0,
        on_update: Callable[[Job], None] = lambda job: None,
        on_execution: Callable[[Execution], None] = lambda execution: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Waited:
        """Wait until a job is complete, delivered or running, or never will be. It is running once
        one of its executions really runs; `on_execution` is told of those that do not yet.

        An older state of it than `generation` and `revision` (its resourceVersion) does not count.
        Survives restarts of the server; `on_lost` is called when it does not answer. Raises
        WaitTimeoutError, NotFoundError (there is no such job, or it was deleted).
        """
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            waited = await self._wait(
                name,
                namespace,
                goal,
                seconds_left(deadline),
                generation,
                revision,
                on_update,
                on_lost,
            )
            if waited is None:
                break
            job = waited.job
            if goal != "running" or not waited.is_reached or job.is_over:
                return waited
            if await wait_for_run_async(self, job, deadline, on_execution):
                return waited
            if deadline is not None and time.monotonic() >= deadline:
                break
        raise WaitTimeoutError(
            f"job {name} was not {goal} after {timeout_seconds:g} s"
            if timeout_seconds is not None
            else f"the wait for job {name} ended",
            hint=f"it goes on; wait again with: bacalhau wait {name}",
        )

    async def _wait(
        self,
        name: str,
        namespace: str,
        goal: Goal,
        timeout_seconds: float | None,
        generation: int,
        revision: int,
        on_update: Callable[[Job], None],
        on_lost: Callable[[], None],
    ) -> Waited | None:
        """By the job alone. None once the time is over."""
        fields = f"name={name}"
        uid = ""
        updates = self.watch(
            Job, namespace=namespace, fields=fields, timeout_seconds=timeout_seconds
        )
        async with aclosing(updates):
            async for update in updates:
                job = update.item
                if update.type == "LOST":
                    on_lost()
                is_gone = job is not None and update.type == "DELETED" and job.metadata.uid == uid
                if is_gone or (update.type == "SYNCED" and not uid):
                    raise NotFoundError(f"there is no job {name} in namespace {namespace}")
                if job is None or job.name != name or update.type == "DELETED":
                    continue
                uid = job.metadata.uid
                on_update(job)
                if job.metadata.resource_version < revision:
                    continue  # from a server that has not heard of what we know
                verdict = judge(job, goal, generation)
                if verdict is not None:
                    return Waited(job, verdict)
        return None

    async def watch(
        self,
        kind: type[R],
        *,
        namespace: str | None = DEFAULT_NAMESPACE,
        labels: str = "",
        fields: str = "",
        since: str = "",
        timeout_seconds: float | None = None,
    ) -> AsyncGenerator[WatchUpdate[R], None]:
        """What exists, then every change, for ever or for so long. Reconnects by itself and goes
        on where it was; only a first connection that fails is an error. An object may be told of
        twice; `metadata.resource_version` says which is newer."""
        wanted = Filter(namespace, labels, fields)
        reader = EventReader(kind)
        reader.cursor = since
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        backoff, was_connected, was_tried = Backoff(), False, False
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0 and was_tried:
                return
            # Without any time, too, what exists is told once.
            left, was_tried = None if left is None else max(left, 0.001), True
            try:
                async with aclosing(self._watch_once(kind, wanted, reader, left)) as updates:
                    async for update in updates:
                        was_connected = True
                        backoff.reset()
                        yield update
            except TransientError:
                if not was_connected:
                    raise
                yield WatchUpdate("LOST")
            pause = backoff.next()
            if deadline is not None:
                pause = max(0.0, min(pause, deadline - time.monotonic()))
            await asyncio.sleep(pause)

    async def _watch_once(
        self, kind: type[R], wanted: Filter, reader: EventReader[R], left: float | None
    ) -> AsyncGenerator[WatchUpdate[R], None]:
        params = wanted.params() | {"watch": "true"}
        params |= {"resourceVersion": reader.cursor} if reader.cursor else {}
        params |= {"timeoutSeconds": f"{left:.3f}"} if left is not None else {}
        async with self._stream(names_of(kind).path(wanted.namespace), params) as answer:
            lines = Lines()
            async for data in answer.aiter_bytes():
                for line in lines.feed(data):
                    for update in reader.feed(line):
                        yield update

    # Output

    async def logs(
        self,
        of: Job | Execution,
        *,
        follow: bool = False,
        tail: int | None = None,
        stream: Literal["stdout", "stderr", "all"] = "all",
        offset: int = 0,
    ) -> AsyncGenerator[LogRecord, None]:
        """The output of an execution, or of all executions of a job. With `follow` until the end.

        Followed, it survives restarts of the server: notices tell of them, and nothing is repeated
        or left out. Otherwise UnavailableError is raised where the log breaks off; the last
        record's `offset` is where to read on (executions only).
        """
        names = JOB if isinstance(of, Job) else EXECUTION
        path = names.path(of.ref.namespace, of.name, "logs")
        params = calls.log_params(follow=follow, tail=tail, stream=stream, offset=offset)
        async with aclosing(self._log_records(path, params, is_job=names is JOB)) as records:
            async for record in records:
                yield record

    async def _log_records(
        self, path: str, params: Mapping[str, str], *, is_job: bool
    ) -> AsyncGenerator[LogRecord, None]:
        """The records of a log. Followed, it goes on over new connections where it was, without
        repeating or leaving out anything."""
        position = LogPosition(has_tail="tail" in params)
        backoff, is_lost, was_connected = Backoff(), False, False
        while True:
            call = calls.read_log(path, params, position.offsets, is_job=is_job)
            try:
                async with aclosing(self._log_once(call)) as records:
                    async for record in records:
                        was_connected = True
                        if record is not None:
                            backoff.reset()
                        if is_lost:
                            is_lost = False
                            yield LogRecord(notice=BACK)
                        is_end = record is not None and record.end
                        for fresh in position.rest() if is_end else ():
                            yield fresh
                        if is_end:
                            return
                        for fresh in position.take(record) if record is not None else ():
                            yield fresh
            except TransientError as error:
                is_told = can_go_on(error.reason) and calls.can_resume(self.server, is_job=is_job)
                if "follow" not in params or not was_connected or not is_told:
                    raise
            position.broke()
            if not is_lost:
                is_lost = True
                yield LogRecord(notice=LOST)
            await asyncio.sleep(backoff.next())

    async def _log_once(self, call: Call[bytes]) -> AsyncGenerator[LogRecord | None, None]:
        """One answer's records; None first, once it is there. Raises where it breaks off."""
        async with self._stream(call.path, call.params, call) as answer:
            yield None
            lines = Lines()
            async for data in answer.aiter_bytes():
                for line in filter(None, lines.feed(data)):
                    record = log_record(line)
                    yield record
                    if record.end:
                        return
        raise connection_error(self.server, EOFError("the log broke off before its end"))

    async def results(
        self, name: str, namespace: str = DEFAULT_NAMESPACE, *, generation: int | None = None
    ) -> Results:
        """The accepted results of a job."""
        return await self.send(calls.results(name, namespace, generation))

    async def link(
        self, execution: str, namespace: str = DEFAULT_NAMESPACE, *, seconds: int = 3600
    ) -> LinkAnswer:
        """A link by which anybody can download the published archive of an execution for so long:
        as good as a password. Raises NotFoundError where there can be none."""
        return await self.send(calls.link(execution, namespace, seconds))

    async def outputs(
        self, execution: str, namespace: str = DEFAULT_NAMESPACE
    ) -> AsyncIterator[OutputFile]:
        """The files that an execution left."""
        after = ""
        while True:
            page = await self.send(calls.outputs(execution, namespace, after))
            for file in page.files:
                yield file
            if page.is_last or not page.files:
                return
            after = page.files[-1].path

    @asynccontextmanager
    async def open_output(
        self, execution: str, path: str, namespace: str = DEFAULT_NAMESPACE, *, offset: int = 0
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of one output file from `offset`, in pieces."""
        where = EXECUTION.path(namespace, execution, "outputs/file")
        async with self._stream(where, {"path": path, "offset": str(offset)}) as answer:
            yield self._pieces(answer)

    @asynccontextmanager
    async def open_archive(
        self, execution: str, namespace: str = DEFAULT_NAMESPACE
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """All outputs of an execution as one tar, in pieces."""
        async with self._stream(
            EXECUTION.path(namespace, execution, "outputs/archive"), {}
        ) as answer:
            yield self._pieces(answer)

    async def download(
        self,
        job: str,
        into: Path,
        namespace: str = DEFAULT_NAMESPACE,
        *,
        generation: int | None = None,
        layout: Layout = "auto",
    ) -> Downloaded:
        """As `Client.download`, which it runs in a thread."""

        def run() -> Downloaded:
            with Client(self.server, token=self._token) as client:
                return client.download(job, into, namespace, generation=generation, layout=layout)

        return await asyncio.to_thread(run)

    # Nodes

    async def node_verb(
        self, verb: Literal["approve", "reject", "cordon", "uncordon", "drain"], name: str
    ) -> Node:
        """Decide about a node."""
        return await self.send(calls.node_verb(verb, name))

    async def create_join_token(self, *, node: str = "", ttl_seconds: int = 3600) -> TokenAnswer:
        """A single-use token that enrols a node."""
        return await self.send(calls.create_token(node, ttl_seconds))

    async def join(self, token: str, node: str, public_key: str) -> JoinAnswer:
        """Enrol this machine as a node."""
        return await self.send(calls.join(token, node, public_key))

    async def version(self) -> Version:
        """What runs on the server."""
        return await self.send(calls.version())

    # Transport

    async def send(self, call: Call[T]) -> T:
        """Send one call. Repeatable ones are tried again over a fresh connection when the old one
        broke, which happens when a server was restarted."""
        for attempt in range(1, TRIES_MAX + 1):
            try:
                answer = await self._http.request(
                    call.method,
                    call.path,
                    params=dict(call.params),
                    content=call.body,
                    headers={"Content-Type": call.content_type} if call.content_type else {},
                )
            except httpx.ConnectError as error:
                raise connection_error(self.server, error) from error
            except httpx.TransportError as error:
                if call.is_repeatable and attempt < TRIES_MAX:
                    continue
                raise connection_error(self.server, error) from error
            if answer.status_code >= 400:
                raise error_from(answer.status_code, answer.content)
            return call.parse(answer.content)
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def _stream(
        self, path: str, params: Mapping[str, str], call: Call[bytes] | None = None
    ) -> AsyncIterator[httpx.Response]:
        call = call or calls.raw(path, params)
        try:
            async with self._http.stream(
                call.method,
                call.path,
                params=dict(call.params),
                content=call.body,
                headers={"Content-Type": call.content_type} if call.content_type else {},
                timeout=_STREAMING,
            ) as answer:
                if answer.status_code >= 400:
                    raise error_from(answer.status_code, await answer.aread())
                yield answer
        except httpx.TransportError as error:
            raise connection_error(self.server, error) from error

    def _pieces(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        return answer.aiter_raw()
