"""One execution's outputs as a tar.gz, as a stream of pieces that are the same each time.

Equal outputs give equal bytes: an upload that was cut off can compare what it would send with what
is there already. Blocks are compressed on several processors at once, each a gzip member of its own;
together they are an ordinary gzip file.
"""

import os
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from bacalhau.node.files import UnreadableError, walk
from bacalhau_api.errors import TransientError

BLOCK_BYTES = 1024 * 1024
LEVEL = 1
"""Outputs are compressed once and read once: level 1 is three times as fast as 6, and 5 % larger."""

ENTRIES_MAX = 100_000
_READ_BYTES = 256 * 1024


def packed(
    outputs: Path,
    *,
    stop: threading.Event | None = None,
    counted: Callable[[Iterator[bytes]], Iterator[bytes]] = iter,
) -> Iterator[bytes]:
    """The tar.gz of a directory, in pieces of up to about BLOCK_BYTES. `counted` sees what goes in.

    Holds a few blocks at a time, whatever the size. Raises TransientError if a file changes
    while it is read, OutputLimitError, UnreadableError, OSError.
    """
    ahead = min(os.cpu_count() or 1, 4) + 1
    with ThreadPoolExecutor(ahead - 1, thread_name_prefix="gzip") as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for block in _blocks(counted(tar_pieces(outputs, stop=stop))):
                waiting.append(pool.submit(_compressed, block))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def tar_pieces(outputs: Path, *, stop: threading.Event | None = None) -> Iterator[bytes]:
    """A tar archive of the regular files, sorted by path; no owner, no times."""
    written = 0
    for path in sorted_files(outputs, stop=stop):
        for piece in _tar_entry(outputs, path):
            written += len(piece)
            yield piece
    end = 2 * tarfile.BLOCKSIZE
    yield bytes(end + -(written + end) % tarfile.RECORDSIZE)


def sorted_files(outputs: Path, *, stop: threading.Event | None = None) -> list[str]:
    """Paths of all regular files below a directory."""
    return sorted(found.path for found in walk(outputs, entries_max=ENTRIES_MAX, stop=stop))


def total_bytes(outputs: Path) -> int:
    """Of all regular files."""
    return sum(found.size_bytes for found in walk(outputs, entries_max=ENTRIES_MAX))


def open_output(outputs: Path, path: str) -> int:
    """A descriptor of one of the files, which no link can lead elsewhere."""
    from bacalhau.node.files import open_beneath

    return open_beneath(outputs, path)


def _tar_entry(outputs: Path, path: str) -> Iterator[bytes]:
    file = open_output(outputs, path)
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(file).st_size
        info = tarfile.TarInfo(path)
        info.size, info.mode = size, 0o755 if os.fstat(file).st_mode & 0o100 else 0o644
        try:
            yield info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
        except UnicodeError as error:
            raise UnreadableError(
                f"the output {ascii(path)[:200]} has a name that is no text"
            ) from error
        left = size
        while left > 0:
            data = stream.read(min(left, _READ_BYTES))
            if not data:
                raise TransientError(f"the output {path} changed while it was published")
            left -= len(data)
            yield data
        if padding := -size % tarfile.BLOCKSIZE:
            yield bytes(padding)


def _blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    block = bytearray()
    for piece in pieces:
        block += piece
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _compressed(block: bytes) -> bytes:
    # 31: gzip. zlib writes no time into its header, so equal blocks give equal bytes.
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, 31)
    return packer.compress(block) + packer.flush()
