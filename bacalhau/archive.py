"""One careful reader of tar archives (plain or gzip), and a writer whose bytes depend on nothing
but what it is given.

Archives come from strangers: job files, results, downloads. The reader decodes header blocks itself
(with tarfile's number and checksum rules), in one pass and in bounded memory, and writes only
through descriptors of directories that it opened without following links. Anything unusual is
refused rather than interpreted: what the writer here makes, and what tar makes of plain files,
directories and links, is all that is needed. The rules for names and links are in
`archive_tree.py`.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from bacalhau.archive_tree import ArchiveError, Tree, folded, link_target, path_parts, show

__all__ = ["ArchiveError", "ArchiveLimits", "Extracted", "TarEntry", "extract", "stream_tar"]

BLOCK_BYTES = tarfile.BLOCKSIZE
_RECORD_BYTES = tarfile.RECORDSIZE
_COPY_BYTES = 256 * 1024
_TRAILER_BYTES_MAX = 1024 * 1024
_EXTENSIONS_MAX = 8  # for one entry
_EXTENSION_BYTES_MAX = 64 * 1024  # of one PAX or GNU extension header
_TIME_MAX = 253_402_300_799  # the end of year 9999
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may hold.

    `ratio_max` bounds unpacked over packed bytes once more than `ratio_free_bytes` are unpacked.
    Names that differ only in letter case or Unicode form are refused unless
    `may_differ_in_case`, because on some file systems they are one.
    """

    entries_max: int = 100_000
    size_bytes_max: int = 16 * 1024**3
    ratio_max: int = 200
    ratio_free_bytes: int = 16 * 1024**2
    may_differ_in_case: bool = False


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was unpacked."""

    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One file for `stream_tar`. `chunks` gives exactly `size_bytes` bytes."""

    path: str
    size_bytes: int
    chunks: Callable[[], AsyncIterator[bytes]]
    mode: int = 0o644
    mtime: int = 0


def extract(stream: BinaryIO, into: Path, limits: ArchiveLimits | None = None) -> Extracted:
    """Unpack into an existing directory. Existing files are never replaced.

    Raises ArchiveError, after removing what was unpacked, and OSError.
    """
    root = os.open(into, _OPEN_DIRECTORY)
    try:
        tree = Tree(root)
        try:
            return _Reader(stream, tree, limits or ArchiveLimits()).run()
        except BaseException:
            tree.undo()
            raise
    finally:
        os.close(root)


async def stream_tar(
    files: Iterable[TarEntry] | AsyncIterable[TarEntry],
) -> AsyncIterator[bytes]:
    """A tar archive (ustar, with PAX headers where needed) of regular files, as it is made.

    Owner, group and device numbers are zero, so equal entries give equal bytes. Raises
    ArchiveError for a path that `extract` would refuse, and for contents of another length.
    """
    written = 0
    async for entry in _each(files):
        parts = path_parts(entry.path)
        if not parts:
            raise ArchiveError(f"a file needs a path, not {entry.path!r}")
        info = tarfile.TarInfo("/".join(parts))
        info.size, info.mode, info.mtime = entry.size_bytes, entry.mode & 0o777, entry.mtime
        header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        yield header
        size = 0
        async for chunk in entry.chunks():
            size += len(chunk)
            if size > entry.size_bytes:
                break
            yield chunk
        if size != entry.size_bytes:
            raise ArchiveError(
                f"{entry.path} was to have {entry.size_bytes} bytes, but has "
                f"{'more' if size > entry.size_bytes else size}: it changed meanwhile"
            )
        padding = -size % BLOCK_BYTES
        if padding:
            yield bytes(padding)
        written += len(header) + size + padding
    yield bytes(2 * BLOCK_BYTES + -(written + 2 * BLOCK_BYTES) % _RECORD_BYTES)


async def _each(
    files: Iterable[TarEntry] | AsyncIterable[TarEntry],
) -> AsyncIterator[TarEntry]:
    if isinstance(files, AsyncIterable):
        async for entry in files:
            yield entry
    else:
        for entry in files:
            yield entry


@dataclass(slots=True)
class _Counted:
    """Counts the packed bytes, and turns damage into ArchiveError."""

    stream: BinaryIO
    count: int = 0
    head: bytes = b""

    def read(self, size: int = -1) -> bytes:
        if self.head:
            data, self.head = self.head[:size], self.head[size:]
        else:
            data = self.stream.read(size)
        self.count += len(data)
        return data


@dataclass(slots=True)
class _Overrides:
    """What extension headers say about the next entry."""

    path: str | None = None
    link: str | None = None
    size: int | None = None
    mtime: float | None = None


@dataclass(slots=True)
class _Reader:
    """One pass over an archive."""

    stream: BinaryIO
    tree: Tree
    limits: ArchiveLimits
    entries: int = 0
    size_bytes: int = 0
    unpacked: int = 0
    spellings: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    packed: _Counted = field(init=False)
    source: BinaryIO | gzip.GzipFile | _Counted = field(init=False)

    def run(self) -> Extracted:
        self.packed = _Counted(self.stream)
        head = self.stream.read(2)
        self.packed.head = head
        self.source = self.packed
        if head == b"\x1f\x8b":
            self.source = gzip.GzipFile(fileobj=self.packed, mode="rb")  # type: ignore[call-overload]
        overrides, extensions = _Overrides(), 0
        while True:
            block = self._read(BLOCK_BYTES)
            if not any(block):
                self._end()
                return Extracted(self.entries, self.size_bytes)
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise ArchiveError(f"it is not a tar archive, or damaged: {error}") from error
            if info.size < 0:
                raise ArchiveError(f"{show(info.name)} has a negative size")
            if info.type in _EXTENSIONS:
                extensions += 1
                if extensions > _EXTENSIONS_MAX:
                    raise ArchiveError("it has many extension headers for one entry")
                self._extension(info, overrides)
                continue
            self.entries += 1
            if self.entries > self.limits.entries_max:
                raise ArchiveError(f"it has more than {self.limits.entries_max} entries")
            self._entry(info, overrides)
            overrides, extensions = _Overrides(), 0

    def _end(self) -> None:
        """Read what follows the end: zeros up to a record's size, and gzip's checksum."""
        size = 0
        while data := self._some(_COPY_BYTES):
            size += len(data)
            if any(data) or size > _TRAILER_BYTES_MAX:
                raise ArchiveError("it has data after its end")

    def _some(self, size: int) -> bytes:
        """Up to so many unpacked bytes; none at the end."""
        try:
            return self.source.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ArchiveError(f"its gzip data is damaged: {error}") from error

    def _read(self, size: int) -> bytes:
        """Exactly so many unpacked bytes."""
        out = bytearray()
        while len(out) < size:
            data = self._some(size - len(out))
            if not data:
                raise ArchiveError("it ends early")
            out += data
        self.unpacked += size
        allowed = max(self.limits.ratio_free_bytes, self.packed.count * self.limits.ratio_max)
        if self.unpacked > allowed:
            raise ArchiveError(
                f"it unpacks to more than {self.limits.ratio_max} times its size: an archive bomb"
            )
        return bytes(out)

    def _body(self, size: int) -> Iterable[bytes]:
        left = size
        while left > 0:
            chunk = self._read(min(left, _COPY_BYTES))
            left -= len(chunk)
            yield chunk
        if padding := -size % BLOCK_BYTES:
            self._read(padding)

    def _extension(self, info: tarfile.TarInfo, overrides: _Overrides) -> None:
        if info.size > _EXTENSION_BYTES_MAX:
            raise ArchiveError(f"it has an extension header of {info.size} bytes")
        data = b"".join(self._body(info.size))
        if info.type == tarfile.GNUTYPE_LONGNAME:
            overrides.path = _text(data)
        elif info.type == tarfile.GNUTYPE_LONGLINK:
            overrides.link = _text(data)
        else:
            self._pax(data, overrides, is_global=info.type == tarfile.XGLTYPE)

    def _pax(self, data: bytes, overrides: _Overrides, *, is_global: bool) -> None:
        for key, value in _pax_records(data):
            if key not in ("path", "linkpath", "size", "mtime"):
                if key.startswith("GNU.sparse"):
                    raise ArchiveError("it has sparse files")
                continue
            if is_global:
                raise ArchiveError(f"it sets {key} for all entries at once")
            if key == "path":
                overrides.path = value
            elif key == "linkpath":
                overrides.link = value
            else:
                number = _number(value)
                if number is None or (key == "size" and number != int(number)):
                    raise ArchiveError(f"it has the {key} {show(value)}")
                if key == "size":
                    overrides.size = int(number)
                else:
                    overrides.mtime = number

    def _entry(self, info: tarfile.TarInfo, overrides: _Overrides) -> None:
        name = info.name if overrides.path is None else overrides.path
        link = info.linkname if overrides.link is None else overrides.link
        size = info.size if overrides.size is None else overrides.size
        mtime = info.mtime if overrides.mtime is None else overrides.mtime
        parts = path_parts(name)
        self._check_spelling(parts)
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            if not parts or name.endswith("/"):
                raise ArchiveError(f"{show(name)} is no name for a file")
            self.size_bytes += size
            if self.size_bytes > self.limits.size_bytes_max:
                raise ArchiveError(f"it holds more than {self.limits.size_bytes_max} bytes")
            mtime = min(max(float(mtime), 0.0), float(_TIME_MAX))
            self.tree.file(parts, self._body(size), info.mode, mtime)
            return
        if size:
            raise ArchiveError(f"{show(name)} is not a file but has contents")
        if info.type == tarfile.DIRTYPE:
            os.close(self.tree.directory(parts))
        elif not parts:
            raise ArchiveError("it replaces the directory into which it is unpacked")
        elif info.type == tarfile.SYMTYPE:
            self.tree.symlink(parts, link_target(link, parts))
        elif info.type == tarfile.LNKTYPE:
            self.tree.hard_link(parts, path_parts(link))
        else:
            raise ArchiveError(
                f"{show(name)} is neither a file, a directory nor a link (type "
                f"{info.type.decode('latin-1')!a})"
            )

    def _check_spelling(self, parts: tuple[str, ...]) -> None:
        """Each path, and each directory above it, must always be spelled in one way."""
        if self.limits.may_differ_in_case:
            return
        for depth in range(1, len(parts) + 1):
            spelled = parts[:depth]
            known = self.spellings.setdefault(folded(spelled), spelled)
            if known != spelled:
                raise ArchiveError(
                    f"{show('/'.join(spelled))} and {show('/'.join(known))} are one name on "
                    "some file systems"
                )


_EXTENSIONS = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(value: str) -> float | None:
    """A plain decimal number that is not negative."""
    whole, _, part = value.partition(".")
    if len(value) > 30 or not whole.isascii() or not whole.isdigit():
        return None
    if part and not (part.isascii() and part.isdigit()):
        return None
    return float(value) if part else int(whole)


def _pax_records(data: bytes) -> Iterable[tuple[str, str]]:
    """`<length> <key>=<value>\\n`, the length counting all of it. Strict, and linear in time."""
    at = 0
    while at < len(data):
        blank = data.find(b" ", at, at + 8)
        digits = data[at:blank] if blank > 0 else b""
        if not digits.isdigit():
            raise ArchiveError("it has a damaged extension header")
        end = at + int(digits)
        record = data[blank + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not equals or not key or not value.endswith(b"\n"):
            raise ArchiveError("it has a damaged extension header")
        yield key.decode("utf-8", "replace"), value[:-1].decode("utf-8", "surrogateescape")
        at = end
