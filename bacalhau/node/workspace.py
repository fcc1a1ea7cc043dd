"""The directories of executions on the node's disk: `<data>/executions/<namespace>/<execution>/`.

All work is done in threads and gives up when nobody waits for it any more.
"""

import asyncio
import contextlib
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from bacalhau.engines import leash
from bacalhau.node.files import (
    OutputLimitError,
    StoppedError,
    Trash,
    UnreadableError,
    open_regular,
    translated,
    walk,
)
from bacalhau_api.errors import InvalidError, Problem, UnavailableError
from bacalhau_api.names import check_result_name
from bacalhau_api.v1.execution import Outputs
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.runner.ports import Collected, Layout

T = TypeVar("T")

ENTRIES_MAX = 100_000
BYTES_MAX = 1 << 40
TAIL_BYTES = 2048
EXIT_CODE = "exitCode"
THREADS_MAX = 8
_PATH_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_BLOCK_BYTES = 1 << 20


class DiskWorkspace:
    """A Workspace in `data_dir`. See `bacalhau_controllers.runner.ports.Workspace`.

    `entries_max` and `bytes_max` bound what one execution may leave as its outputs. With `flushes`
    they are on the disk before they are reported, so that a finished result survives a power
    failure; this costs about one flush for each file that is not empty.
    """

    def __init__(
        self,
        data_dir: Path,
        clock: Clock,
        *,
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
        flushes: bool = True,
    ) -> None:
        data_dir = data_dir.absolute()  # other processes are told these paths
        self._executions = data_dir / "executions"
        self._trash = Trash(data_dir / "trash")
        self._contact = data_dir / "contact"
        self._clock = clock
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._flushes = flushes
        self._first_seen: dict[tuple[str, str], float] = {}
        self._is_trash_emptied = False
        # Reading outputs can take long, and must not hold up whoever else needs a thread.
        self._threads = ThreadPoolExecutor(THREADS_MAX, thread_name_prefix="workspace")

    def layout(self, namespace: str, execution: str) -> Layout:
        """See Workspace."""
        for field, name in (("namespace", namespace), ("execution", execution)):
            _check(field, name, _check_path_name)
        return Layout(self._executions / namespace / execution)

    @property
    def contact_file(self) -> Path:
        """See Workspace."""
        return self._contact

    async def note_contact(self, boot: str, at: float) -> None:
        """See Workspace."""
        try:
            await asyncio.to_thread(leash.note, self._contact, boot, at)
        except OSError as error:
            raise UnavailableError(f"cannot write {self._contact}: {error.strerror}") from error

    async def prepare(self, layout: Layout, inputs: int) -> None:
        """See Workspace."""
        await self._in_thread(self._prepare, layout, inputs)

    async def begin_run(
        self, layout: Layout, run: int, results: Sequence[str], *, reset: bool
    ) -> None:
        """See Workspace."""
        for name in results:
            _check("result", name, check_result_name)
        await self._in_thread(self._begin_run, layout, run, tuple(results), reset)

    async def collect(self, layout: Layout, exit_code: int | None) -> Collected:
        """See Workspace."""
        return await self._in_thread(self._collect, layout, exit_code)

    async def drop_outputs(self, layout: Layout) -> None:
        """See Workspace."""
        await self._in_thread(self._drop, layout)

    async def remove(self, layout: Layout) -> None:
        """See Workspace."""
        await self._in_thread(self._remove, layout)

    async def strays(self) -> Sequence[tuple[str, str, float]]:
        """See Workspace. The age counts from when this process first saw the directory: file
        times are by the wall clock, which may be wrong."""
        found = await self._in_thread(self._list)
        now = self._clock.monotonic()
        self._first_seen = {key: self._first_seen.get(key, now) for key in found}
        return tuple((*key, now - since) for key, since in self._first_seen.items())

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Run in a thread of our own, and let it know when nobody waits any more."""
        stop = threading.Event()
        loop = asyncio.get_running_loop()
        try:
            work = functools.partial(function, *arguments, stop)
            return await loop.run_in_executor(self._threads, work)
        except asyncio.CancelledError:
            stop.set()
            raise

    # -- in threads ------------------------------------------------------------------------------

    def _prepare(self, layout: Layout, inputs: int, stop: threading.Event) -> None:
        with translated(f"the directory {layout.root} cannot be made"):
            if not self._is_trash_emptied:  # what a crash left over
                self._is_trash_emptied = True
                self._trash.empty(stop)
            self._trash.remove(layout.root / "inputs", stop)
            for number in range(inputs):
                _make(layout.input(number))
            _make(layout.outputs)

    def _begin_run(
        self, layout: Layout, run: int, results: tuple[str, ...], reset: bool, stop: threading.Event
    ) -> None:
        with translated(f"the directory {layout.root} cannot be made"):
            if reset:
                for path in (layout.outputs, layout.log_index, layout.root / "runs"):
                    self._trash.remove(path, stop)
            for name in results:
                _make(layout.result(name))
            _make(layout.outputs)
            _make(layout.run(run))

    def _collect(self, layout: Layout, exit_code: int | None, stop: threading.Event) -> Collected:
        with translated(f"the outputs in {layout.outputs} cannot be read"):
            _make(layout.outputs)
            # Nothing runs any more. What it had as input can leave the cache from now on.
            self._trash.remove(layout.root / "inputs", stop)
            if exit_code is not None:
                _write(layout.outputs / EXIT_CODE, f"{exit_code}".encode())
            return Collected(
                outputs=self._sum_up(layout.outputs, stop),
                stdout_tail=_tail(layout.outputs, layout.stdout.name),
                stderr_tail=_tail(layout.outputs, layout.stderr.name),
            )

    def _sum_up(self, outputs: Path, stop: threading.Event) -> Outputs:
        lines: list[tuple[bytes, str]] = []
        size = 0
        for found in walk(outputs, entries_max=self._entries_max, stop=stop):
            try:
                file = found.open()
            except PermissionError as error:
                raise UnreadableError(f"output file {found.path} cannot be read") from error
            with open(file, "rb", buffering=0) as stream:
                digest = hashlib.sha256()
                if self._flushes and found.size_bytes:
                    os.fsync(file)
                while block := stream.read(_BLOCK_BYTES):
                    if stop.is_set():
                        raise StoppedError
                    digest.update(block)
                    size += len(block)
                    if size > self._bytes_max:
                        raise OutputLimitError(f"outputs are larger than {self._bytes_max} bytes")
            lines.append((found.path.encode(), digest.hexdigest()))
        if self._flushes:
            _flush_directory(outputs)
        total = hashlib.sha256()
        for path, hexadecimal in sorted(lines):
            total.update(hexadecimal.encode() + b"  " + path + b"\n")
        return Outputs(files=len(lines), size_bytes=size, digest=f"sha256:{total.hexdigest()}")

    def _drop(self, layout: Layout, stop: threading.Event) -> None:
        with translated(f"{layout.root} cannot be emptied"):
            for name in ("inputs", "outputs", "runs", layout.log_index.name):
                self._trash.remove(layout.root / name, stop)

    def _remove(self, layout: Layout, stop: threading.Event) -> None:
        with translated(f"{layout.root} cannot be removed"):
            self._trash.remove(layout.root, stop)
            with contextlib.suppress(OSError):  # not there, or others of its namespace are
                layout.root.parent.rmdir()

    def _list(self, stop: threading.Event) -> list[tuple[str, str]]:
        with translated(f"{self._executions} cannot be listed"):
            if not self._executions.is_dir():
                return []
            return [
                (namespace.name, execution.name)
                for namespace in sorted(self._executions.iterdir())
                if namespace.is_dir() and not namespace.is_symlink()
                for execution in sorted(namespace.iterdir())
            ]


def _check(field: str, value: str, check: Callable[[str], str]) -> None:
    try:
        check(value)
    except ValueError as error:
        raise InvalidError([Problem(field, str(error), repr(value))]) from error


def _check_path_name(value: str) -> str:
    """One part of a path. The names of executions are derived from others, and longer."""
    if len(value) > 255 or not _PATH_NAME.fullmatch(value):
        raise ValueError("it cannot be the name of a directory")
    return value


def _make(directory: Path) -> None:
    """With all its parents, for this node alone (mkdir gives its mode to the last one only)."""
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(exist_ok=True, mode=0o700)


def _flush_directory(directory: Path) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    with open(file, "wb") as stream:
        stream.write(data)


def _tail(directory: Path, name: str) -> str:
    """The last bytes of a stream as text of at most as many bytes."""
    try:
        parent = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            file = open_regular(parent, name)
        finally:
            os.close(parent)
    except (FileNotFoundError, UnreadableError):
        return ""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - TAIL_BYTES))
        data = stream.read(TAIL_BYTES)
    start = 0
    while size > TAIL_BYTES and start < 3 and data[start] & 0xC0 == 0x80:
        start += 1  # the rest of a character whose beginning was cut off
    return shorten(data[start:].decode("utf-8", "replace"))


def shorten(text: str) -> str:
    """The end of a text, at most TAIL_BYTES of UTF-8."""
    data = text.encode()
    return data[-TAIL_BYTES:].decode("utf-8", "ignore") if len(data) > TAIL_BYTES else text
