"""Walking, reading and removing trees that a workload has written: nothing in them is trusted.

Everything goes by directory descriptors and follows no symbolic link, so that a link, or a
directory that is swapped for one in between, leads nowhere. Only regular files are ever opened:
opening a FIFO would wait for ever, opening a device might do something.
"""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bacalhau_api.errors import NotFoundError, TerminalError, TransientError

DEPTH_MAX = 100
"""Directories within directories. Bounds open descriptors; results beyond it are refused."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class OutputLimitError(TerminalError):
    """A workload left more than this node lets it."""

    reason = "OutputLimit"


class UnreadableError(TerminalError):
    """A file among the outputs cannot be read by this node."""

    reason = "OutputUnreadable"


class StoppedError(Exception):
    """Whoever waited for this has gone."""


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file: its path below the root, and the directory it is in, still open."""

    path: str
    name: str
    directory: int
    size_bytes: int

    def open(self) -> int:
        """A descriptor to read from. Raises OSError, UnreadableError if it is no regular file any
        more."""
        return open_regular(self.directory, self.name)


def open_regular(directory: int, name: str) -> int:
    """Open a regular file in an open directory. Raises OSError; IsADirectoryError and the like for
    what is no regular file."""
    if not stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        raise UnreadableError(f"{name!r} is no regular file")
    file = os.open(name, _FILE, dir_fd=directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):  # swapped in between
        os.close(file)
        raise UnreadableError(f"{name!r} is no regular file")
    return file


def open_beneath(root: Path, path: str) -> int:
    """Open the regular file `path` (relative, with `/`) below `root`.

    Raises NotFoundError for whatever is not one, wherever it would lead.
    """
    parts = path.split("/")
    if "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise NotFoundError(f"{path!r} is not the path of an output")
    if len(parts) > DEPTH_MAX:
        raise NotFoundError(f"the path has more than {DEPTH_MAX} parts")
    with contextlib.ExitStack() as stack:
        try:
            directory = _open_directory(stack, root)
            for part in parts[:-1]:
                directory = _open_directory(stack, part, directory)
            return open_regular(directory, parts[-1])
        except (OSError, UnreadableError) as error:
            raise NotFoundError(f"there is no output file {path!r} that can be read") from error


def _open_directory(
    stack: contextlib.ExitStack, name: Path | str, parent: int | None = None
) -> int:
    directory = os.open(name, _DIRECTORY, dir_fd=parent)
    stack.callback(os.close, directory)
    return directory


def walk(root: Path, *, entries_max: int, stop: threading.Event | None = None) -> Iterator[Found]:
    """All regular files below `root`, a directory at a time, in no particular order across them.

    Symbolic links, devices, sockets and FIFOs are passed over. Raises OutputLimitError beyond
    `entries_max` entries or DEPTH_MAX levels, UnreadableError, StoppedError.
    """
    seen = 0
    with contextlib.ExitStack() as stack:
        top = _open_directory(stack, root)
        # Each level has its open directory and the names of subdirectories yet to be walked.
        levels: list[tuple[int, str, list[str]]] = []
        pending: tuple[int, str] | None = (os.dup(top), "")
        stack.callback(_close_all, levels)
        while pending is not None:
            directory, prefix = pending
            levels.append((directory, prefix, []))
            if len(levels) > DEPTH_MAX:
                raise OutputLimitError(f"outputs are nested deeper than {DEPTH_MAX} directories")
            for entry in _entries(directory, prefix):
                seen += 1
                if seen > entries_max:
                    raise OutputLimitError(f"outputs have more than {entries_max} files")
                if stop is not None and stop.is_set():
                    raise StoppedError
                if entry.is_dir(follow_symlinks=False):
                    levels[-1][2].append(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    yield Found(_shown(prefix + entry.name), entry.name, directory, size)
            pending = _descend(levels)


def _close_all(levels: list[tuple[int, str, list[str]]]) -> None:
    for directory, _, _ in levels:
        os.close(directory)


def _entries(directory: int, prefix: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as found:
            yield from sorted(found, key=lambda entry: entry.name)
    except PermissionError as error:
        raise UnreadableError(f"directory {prefix or '.'} cannot be read") from error


def _descend(levels: list[tuple[int, str, list[str]]]) -> tuple[int, str] | None:
    """Open the next directory to walk; close those that are done."""
    while levels:
        directory, prefix, names = levels[-1]
        while names:
            name = names.pop()
            try:
                return os.open(name, _DIRECTORY, dir_fd=directory), f"{prefix}{name}/"
            except PermissionError as error:
                raise UnreadableError(f"directory {prefix}{name} cannot be read") from error
            except OSError:
                continue  # gone, or swapped for a link
        os.close(directory)
        levels.pop()
    return None


def _shown(path: str) -> str:
    """A path as text that can be sent: bytes that are no UTF-8 cannot, and would name no file to
    whoever asks for it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UnreadableError(f"the name of an output is not valid UTF-8: {path!a}") from error
    return path


class Trash:
    """Removes trees. A tree first leaves its place, in one step, and is then taken apart; what a
    crash left over is removed by the next `empty`.

    Trees may be of any depth: what lies deep is moved up rather than descended to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0
        self._lock = threading.Lock()

    def remove(self, path: Path, stop: threading.Event | None = None) -> None:
        """Remove a file or a tree; nothing happens if it is not there. Raises OSError,
        StoppedError (the rest is in the trash)."""
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = self._directory / self._next()
        try:
            os.rename(path, place)
        except FileNotFoundError:
            return
        self._take_apart([place.name], stop)

    def empty(self, stop: threading.Event | None = None) -> None:
        """Remove what is in the trash."""
        with contextlib.suppress(FileNotFoundError):
            self._take_apart(sorted(os.listdir(self._directory)), stop)

    def _next(self) -> str:
        with self._lock:
            while True:
                self._count += 1
                name = str(self._count)
                if not os.path.lexists(self._directory / name):
                    return name

    def _take_apart(self, names: list[str], stop: threading.Event | None) -> None:
        trash = os.open(self._directory, _DIRECTORY)
        try:
            while names:
                self._remove_entry(trash, trash, names.pop(), 0, names, stop)
        finally:
            os.close(trash)

    def _remove_entry(
        self,
        trash: int,
        parent: int,
        name: str,
        depth: int,
        names: list[str],
        stop: threading.Event | None,
    ) -> None:
        if stop is not None and stop.is_set():
            raise StoppedError
        try:
            status = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=parent)
            return
        if depth >= DEPTH_MAX // 2:
            up = self._next()
            os.rename(name, up, src_dir_fd=parent, dst_dir_fd=trash)
            names.append(up)
            return
        directory = _open_writable(name, parent)
        try:
            with os.scandir(directory) as found:
                children = [entry.name for entry in found]
            for child in children:
                self._remove_entry(trash, directory, child, depth + 1, names, stop)
        finally:
            os.close(directory)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(name, dir_fd=parent)


def _open_writable(name: str, parent: int) -> int:
    """Open a directory whose entries are to be removed, whatever its mode."""
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    except PermissionError:
        # A workload may have locked its own directory. No link is followed: it is a directory
        # in one that only this node can write to by now.
        os.chmod(name, 0o700, dir_fd=parent)
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    if not os.fstat(directory).st_mode & stat.S_IWUSR:
        with contextlib.suppress(PermissionError):
            os.fchmod(directory, 0o700)
    return directory


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Say what the disk refused in the project's errors. Raises TransientError."""
    try:
        yield
    except OSError as error:
        raise TransientError(f"{what}: {error.strerror or error}", reason="Disk") from error
