"""Writes the output of one run: raw stdout and stderr, and an index of what came when.

Standard library only, because it is used inside wasm workers, which start in milliseconds. The
other half, reading, is in `logfile.py`, which also gives `LogWriter` its public name.

The index is a row of 24-byte little-endian records `<QQII`: microseconds since the epoch, offset
in the stream's file, length, stream (1 stdout, 2 stderr). A record is written after its payload,
so that whatever the index names is there. The newest record alone may still grow: output of the
same stream that follows within a moment extends it, which keeps the index small when a program
writes byte by byte.
"""

import os
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

Stream = Literal["stdout", "stderr"]

RECORD = struct.Struct("<QQII")
STREAM_NUMBERS: dict[Stream, int] = {"stdout": 1, "stderr": 2}
STREAM_NAMES: dict[int, Stream] = {1: "stdout", 2: "stderr"}

_LENGTH = struct.Struct("<I")
_LENGTH_AT = 16  # of the length within a record
_JOINED_BYTES_MAX = 64 * 1024
# How close in time (microseconds) writes must be to share a record, by the number of records so
# far: 10 records a second for ever are fine, a million one-byte writes are not.
_JOIN_WITHIN = ((100_000, 5_000), (500_000, 100_000), (1 << 62, 5_000_000))


class Record(NamedTuple):
    """One entry of the index."""

    time_us: int
    offset: int
    length: int
    stream: int


class OutputLimitError(Exception):
    """A stream reached its limit; what fitted was written."""

    def __init__(self, stream: Stream, bytes_max: int) -> None:
        super().__init__(f"{stream} is longer than the {bytes_max} bytes allowed")
        self.stream = stream
        self.bytes_max = bytes_max


def read_records(log_index: Path) -> list[Record]:
    """All whole records; a torn one at the end (the machine went down) is left out."""
    try:
        data = log_index.read_bytes()
    except FileNotFoundError:
        return []
    whole = len(data) - len(data) % RECORD.size
    records = (Record(*r) for r in RECORD.iter_unpack(data[:whole]))
    return [r for r in records if r.stream in STREAM_NAMES]


class LogWriter:
    """Appends to a run's log. One writer at a time; not for use from two threads at once.

    `bytes_max` counts what this writer adds to each stream. A writer that follows another (a
    service was started again) first repairs what a crash may have left: a torn record, payload
    that no record names, or records whose payload was lost with the power.
    """

    def __init__(self, stdout: Path, stderr: Path, log_index: Path, *, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._files: dict[Stream, int] = {}
        self._index = -1
        try:
            self._files["stdout"] = os.open(stdout, flags, 0o644)
            self._files["stderr"] = os.open(stderr, flags, 0o644)
            self._ends: dict[Stream, int] = {
                stream: os.fstat(fd).st_size for stream, fd in self._files.items()
            }
            self._starts = dict(self._ends)
            _repair(log_index, self._ends, time.time_ns() // 1000)
            # No O_APPEND here: the newest record is rewritten in place when it grows.
            self._index = os.open(
                log_index, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
            )
            self._index_end = os.fstat(self._index).st_size
        except BaseException:
            self.close()
            raise
        self._last: Record | None = None

    def write(self, stream: Stream, data: bytes) -> None:
        """Append. Raises OutputLimitError once the stream is full, OSError if the disk is."""
        room = self._bytes_max - (self._ends[stream] - self._starts[stream])
        cut = data[:room] if len(data) > room else data
        if cut:
            self._append(stream, cut, time.time_ns() // 1000)
        if len(data) > room:
            raise OutputLimitError(stream, self._bytes_max)

    def sync(self) -> None:
        """Return once everything written so far is on disk."""
        for stream, fd in self._files.items():
            if self._ends[stream] > self._starts[stream]:
                os.fdatasync(fd)
        if self._last is not None:
            os.fdatasync(self._index)

    def close(self) -> None:
        """Let go of the files. May be called again."""
        for fd in self._files.values():
            os.close(fd)
        self._files = {}
        if self._index >= 0:
            os.close(self._index)
            self._index = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, stream: Stream, data: bytes, now_us: int) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._files[stream], view) :]
        record = Record(now_us, self._ends[stream], len(data), STREAM_NUMBERS[stream])
        self._ends[stream] += len(data)
        last = self._last
        if last is not None and self._joins(last, record):
            grown = last._replace(length=last.length + record.length)
            at = self._index_end - RECORD.size + _LENGTH_AT
            os.pwrite(self._index, _LENGTH.pack(grown.length), at)
            self._last = grown
        else:
            os.pwrite(self._index, RECORD.pack(*record), self._index_end)
            self._index_end += RECORD.size
            self._last = record

    def _joins(self, last: Record, record: Record) -> bool:
        if last.stream != record.stream or last.length + record.length > _JOINED_BYTES_MAX:
            return False
        count = self._index_end // RECORD.size
        within = next(us for below, us in _JOIN_WITHIN if count < below)
        return 0 <= record.time_us - last.time_us <= within


def _repair(log_index: Path, sizes: dict[Stream, int], now_us: int) -> None:
    """Make the index name every byte of both files exactly once."""
    records = read_records(log_index)
    try:
        size = log_index.stat().st_size
    except FileNotFoundError:
        size = 0
    fixed: list[Record] = []
    ends: dict[Stream, int] = {"stdout": 0, "stderr": 0}
    for record in records:
        stream = STREAM_NAMES[record.stream]
        length = min(record.length, sizes[stream] - record.offset)
        if length > 0 and record.offset == ends[stream]:
            fixed.append(record._replace(length=length))
            ends[stream] += length
    for stream, end in ends.items():
        while end < sizes[stream]:
            length = min(sizes[stream] - end, 0xFFFFFFFF)
            fixed.append(Record(now_us, end, length, STREAM_NUMBERS[stream]))
            end += length
    if fixed == records and size == len(records) * RECORD.size:
        return
    fresh = log_index.with_name(log_index.name + ".new")
    fresh.write_bytes(b"".join(RECORD.pack(*record) for record in fixed))
    os.replace(fresh, log_index)
