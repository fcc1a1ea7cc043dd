"""A whole API server for tests: MemoryStore, real cache and informer, real uvicorn on loopback in a
thread of its own, and nodes that are folders."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from bacalhau.enrolment import Enrolment
from bacalhau.server.access import Access
from bacalhau.server.app import ApiApp, ApiServer, create_app
from bacalhau.server.ports import LogStream, Services, SignLink
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import NotFoundError, UnavailableError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.execution import OutputFile
from bacalhau_api.v1.job import SpecConfig
from bacalhau_api.wire import LogChunk, LogPiece, OutputsPage
from bacalhau_controllers.cache import Cache, Informer
from bacalhau_controllers.memory import MemoryStore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Delete, Put, Why, Write

T = TypeVar("T")

TEST = Why("test", "Arranged")
PAGE_FILES = 3


class FolderNodes:
    """Nodes as folders: `<root>/<node>/<namespace>/<execution>/outputs`. Logs are `stdout` and
    `stderr` in it, and end when a file `done` lies beside `outputs`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.away: set[str] = set()
        self.slow: dict[str, float] = {}
        """By execution: how long each read of its log takes, in seconds."""
        self.reads = 0

    def directory(self, node: str, namespace: str, execution: str) -> Path:
        """Where an execution's things are."""
        return self.root / node / namespace / execution

    def write(self, node: str, execution: str, path: str, text: str | bytes) -> Path:
        """Append to an output file, in namespace default."""
        file = self.directory(node, "default", execution) / "outputs" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)
        return file

    def finish(self, node: str, execution: str) -> None:
        """No more output will come."""
        (self.directory(node, "default", execution) / "done").touch()

    def _outputs(self, node: str, namespace: str, execution: str) -> Path:
        if node in self.away:
            raise UnavailableError(f"node {node} did not answer")
        directory = self.directory(node, namespace, execution)
        if not directory.is_dir():
            raise NotFoundError(f"node {node} has no execution {execution}")
        return directory / "outputs"

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
        """Offsets count bytes of stdout and stderr together, stdout first."""
        self.reads += 1
        await asyncio.sleep(self.slow.get(execution, 0.0))
        outputs = self._outputs(node, namespace, execution)
        deadline = asyncio.get_running_loop().time() + wait_seconds
        while True:
            is_end = (outputs.parent / "done").exists()
            data = {
                name: (outputs / name).read_bytes() if (outputs / name).exists() else b""
                for name in ("stdout", "stderr")
                if stream in ("all", name)
            }
            size = sum(len(part) for part in data.values())
            start = offset if offset is not None else size
            if tail_lines is not None and data.get("stdout"):
                lines = data["stdout"].splitlines(keepends=True)
                kept = b"".join(lines[len(lines) - tail_lines :]) if tail_lines else b""
                start = len(data["stdout"]) - len(kept)
            if size > start or is_end or asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(0.01)
        pieces, at = [], 0
        for name, part in data.items():
            fresh = part[max(0, start - at) :]
            at += len(part)
            if fresh:
                pieces.append(LogPiece(stream=name, text=fresh.decode()))  # type: ignore[arg-type]
        return LogChunk(pieces=tuple(pieces), next_offset=size, is_end=is_end)

    async def list_outputs(
        self, node: str, namespace: str, execution: str, after: str
    ) -> OutputsPage:
        """A few files at a time, so that paging is needed."""
        outputs = self._outputs(node, namespace, execution)
        files = sorted(
            (str(path.relative_to(outputs)), path.stat().st_size)
            for path in outputs.rglob("*")
            if path.is_file()
        )
        rest = [OutputFile(path=name, size_bytes=size) for name, size in files if name > after]
        return OutputsPage(files=tuple(rest[:PAGE_FILES]), is_last=len(rest) <= PAGE_FILES)

    async def read_output(
        self, node: str, namespace: str, execution: str, path: str, offset: int, size: int
    ) -> bytes:
        """A piece of a file."""
        self.reads += 1
        file = self._outputs(node, namespace, execution) / path
        if not file.is_file():
            raise NotFoundError(f"there is no {path}")
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)


Shell = Callable[..., tuple[int, str, str]]
"""Runs a command line against the server: exit code, stdout, stderr."""


class RunningServer:
    """A server in a thread. `call` runs a coroutine in its event loop."""

    def __init__(self, nodes: FolderNodes, access: Access | None = None, port: int = 0) -> None:
        self.nodes = nodes
        self.url = ""
        self.state: State
        self.app: ApiApp
        self.server: ApiServer
        self.sign: SignLink | None = None
        self._access = access
        self._port = port
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Return once it listens."""
        self._thread.start()
        assert self._ready.wait(20), "the server did not start"

    @property
    def is_running(self) -> bool:
        """False once it was stopped."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Return once it has ended."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(setattr, self.server, "should_exit", True)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the server did not end"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _sign(self, location: SpecConfig, seconds: int) -> str:
        if self.sign is None:
            raise UnavailableError("this server signs no links")
        return await self.sign(location, seconds)

    async def _main(self) -> None:
        clock, ids = SystemClock(), SystemIds()
        store, cache = MemoryStore(clock), Cache()
        self.state = State(store, cache)
        services = Services(
            state=self.state,
            nodes=self.nodes,
            enrolment=Enrolment(self.state, clock, ids, nats_url="nats://127.0.0.1:4222"),
            clock=clock,
            ids=ids,
            version="0.1.0",
            gauges=lambda: {"work_queue_depth_job": 7.0},
            sign=self._sign,
        )
        self.app = create_app(services, self._access)
        informer = asyncio.create_task(Informer(store, cache, clock).run())
        await cache.wait_synced()
        self.server = ApiServer(self.app, "127.0.0.1", self._port)
        self.url = f"http://127.0.0.1:{self.server.bind()}"
        serving = asyncio.create_task(self.server.run_until_told())
        # Bound already: connections wait in the socket's queue until they are served.
        self._ready.set()
        await serving
        informer.cancel()
        await asyncio.gather(informer, return_exceptions=True)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run in the server's loop, and wait for the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def put(self, *resources: Resource) -> tuple[Resource, ...]:
        """Store objects, whatever is there, as controllers would."""

        async def commit() -> tuple[Resource, ...]:
            writes: list[Write] = []
            for resource in resources:
                found = await self.state.store.get(resource.ref)
                writes.append(Put(resource, found.metadata.resource_version if found else 0))
            return tuple(r for r in await self.state.commit(writes, TEST) if r is not None)

        return self.call(commit())

    def drop(self, ref: Ref) -> None:
        """Remove an object."""

        async def commit() -> None:
            found = await self.state.store.get(ref)
            assert found is not None
            await self.state.commit([Delete(ref, found.metadata.resource_version)], TEST)

        self.call(commit())

    def get(self, ref: Ref) -> Resource | None:
        """What the store has."""
        return self.call(self.state.store.get(ref))

    def all(self, kind: str) -> Sequence[Resource]:
        """All objects of a kind."""
        return self.call(self.state.store.list(kind)).items


@contextmanager
def running_server(
    root: Path, access: Access | None = None, *, port: int = 0
) -> Iterator[RunningServer]:
    """A server for as long as the context is open."""
    server = RunningServer(FolderNodes(root), access, port)
    server.start()
    try:
        yield server
    finally:
        server.stop()
