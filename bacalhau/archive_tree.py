"""Where an archive is unpacked: rules for names and links, and a tree that is written to only
through descriptors of directories that were opened without following links.

Symbolic links may only climb at their beginning, from the real directory in which they lie, and
not above the root; so whatever other links they pass through, they end inside.
"""

import contextlib
import errno
import os
import unicodedata
from collections.abc import Iterable, Iterator

from bacalhau_api.errors import TerminalError

_NAME_BYTES_MAX = 255
_PATH_BYTES_MAX = 4096
_DEPTH_MAX = 64
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class ArchiveError(TerminalError):
    """The archive is damaged, hostile or too large. Nothing of it was left behind."""

    reason = "ArchiveRefused"


def show(name: str) -> str:
    return ascii(name if len(name) <= 120 else name[:117] + "...")


def path_parts(name: str) -> tuple[str, ...]:
    """The components of a relative path; () for the root itself. Raises ArchiveError."""
    if name.startswith("/"):
        raise ArchiveError(f"{show(name)} is an absolute path")
    if "\\" in name or name[1:2] == ":":
        raise ArchiveError(f"{show(name)} would be another path on other systems")
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise ArchiveError(f"{show(name)} has control characters or is not UTF-8")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise ArchiveError(f"{show(name)} climbs with '..'")
    if len(name.encode()) > _PATH_BYTES_MAX or len(parts) > _DEPTH_MAX:
        raise ArchiveError(f"{show(name)} is too long or too deep")
    if any(len(part.encode()) > _NAME_BYTES_MAX for part in parts):
        raise ArchiveError(f"{show(name)} has a component of more than 255 bytes")
    return parts


def link_target(target: str, parts: tuple[str, ...]) -> str:
    """A symbolic link's target, if it can only lead inside. Raises ArchiveError."""
    where = show("/".join(parts))
    climbs = 0
    rest = target.split("/")
    while rest and rest[0] == "..":
        climbs += 1
        rest = rest[1:]
    if not target or target.startswith("/") or climbs > len(parts) - 1 or ".." in rest:
        raise ArchiveError(f"the link {where} to {show(target)} may lead out of the archive")
    path_parts("/".join(rest))
    return target


def folded(parts: tuple[str, ...]) -> tuple[str, ...]:
    """What a file system that ignores case and Unicode form makes of a path."""
    return tuple(
        unicodedata.normalize("NFC", unicodedata.normalize("NFC", part).casefold())
        for part in parts
    )


class Tree:
    """Writes below one directory, and remembers what it made."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._made: list[tuple[tuple[str, ...], bool]] = []  # path, is it a directory
        self._files: set[tuple[str, ...]] = set()

    def directory(self, parts: tuple[str, ...]) -> int:
        """Open a directory, making what is missing; the caller closes."""
        fd = os.dup(self._root)
        for depth, part in enumerate(parts, 1):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                    self._made.append((parts[:depth], True))
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=fd)
            except OSError as error:
                os.close(fd)
                if isinstance(error, NotADirectoryError) or error.errno == errno.ELOOP:
                    text = f"{show('/'.join(parts[:depth]))} is not a directory"
                    raise ArchiveError(text) from error
                raise
            os.close(fd)
            fd = below
        return fd

    def file(
        self, parts: tuple[str, ...], chunks: Iterable[bytes], mode: int, mtime: float
    ) -> None:
        """Write a new file."""
        parent = self.directory(parts[:-1])
        try:
            with self._exclusive(parts):
                fd = os.open(parts[-1], _CREATE_FILE, 0o600, dir_fd=parent)
        finally:
            os.close(parent)
        self._made.append((parts, False))
        self._files.add(parts)
        with os.fdopen(fd, "wb", buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) or 0 :]
            # No setuid, setgid, sticky bits; nobody but the owner may write.
            os.fchmod(fd, (mode & 0o755) | 0o600)
            os.utime(fd, (mtime, mtime))

    def symlink(self, parts: tuple[str, ...], target: str) -> None:
        """Make a symbolic link to a target that was judged."""
        parent = self.directory(parts[:-1])
        try:
            with self._exclusive(parts):
                os.symlink(target, parts[-1], dir_fd=parent)
        finally:
            os.close(parent)
        self._made.append((parts, False))

    def hard_link(self, parts: tuple[str, ...], target: tuple[str, ...]) -> None:
        """Link to a file that came out of the same archive."""
        if target not in self._files:
            raise ArchiveError(
                f"{show('/'.join(parts))} links to {show('/'.join(target))}, which is not a "
                "file earlier in the archive"
            )
        parent = self.directory(parts[:-1])
        source = self.directory(target[:-1])
        try:
            with self._exclusive(parts):
                os.link(
                    target[-1], parts[-1],
                    src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False,
                )  # fmt: skip
        finally:
            os.close(source)
            os.close(parent)
        self._made.append((parts, False))
        self._files.add(parts)

    def undo(self) -> None:
        """Remove all that was made, as far as it is still there."""
        for parts, is_directory in reversed(self._made):
            with contextlib.suppress(OSError, ArchiveError):
                parent = self._existing(parts[:-1])
                try:
                    if is_directory:
                        os.rmdir(parts[-1], dir_fd=parent)
                    else:
                        os.unlink(parts[-1], dir_fd=parent)
                finally:
                    os.close(parent)

    def _existing(self, parts: tuple[str, ...]) -> int:
        fd = os.dup(self._root)
        for part in parts:
            try:
                below = os.open(part, _OPEN_DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    @staticmethod
    @contextlib.contextmanager
    def _exclusive(parts: tuple[str, ...]) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise ArchiveError(f"{show('/'.join(parts))} exists already") from error
