"""The log of one run, as all engines keep it: `LogWriter` appends, `LogReader` answers reads.

A position (`LogChunk.next_offset`) counts bytes: of the stream's own file when one stream is read,
of both streams in the order of the index when all are. It stays valid while the log grows, so a
reader that was cut off goes on where it stopped. A position belongs to one choice of stream.
"""

import bisect
import codecs
import json
import os
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from bacalhau.engines.logwriter import (
    RECORD,
    STREAM_NAMES,
    STREAM_NUMBERS,
    LogWriter,
    OutputLimitError,
    Stream,
)
from bacalhau_api.wire import LogChunk, LogPiece

__all__ = ["LogReader", "LogWriter", "OutputLimitError", "Stream", "StreamChoice"]

StreamChoice = Literal["stdout", "stderr", "all"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_READ_BYTES_MIN = 16  # a piece must have room for one character of any length
_PIECE_OVERHEAD_BYTES = 96  # of a LogPiece's JSON beside its text
_JOIN_WITHIN_US = 50_000
_BLOCK_BYTES = 64 * 1024
_TIME_US_MAX = 250_000_000_000_000_000  # year 9892


class _Span(NamedTuple):
    """Consecutive bytes of one stream; `position` counts along the sequence that is read."""

    position: int
    stream: Stream
    offset: int
    length: int
    time_us: int


class _Track:
    """The index as one choice of stream sees it: 29 bytes of memory a record."""

    def __init__(self, choice: StreamChoice) -> None:
        self.numbers = frozenset(
            STREAM_NUMBERS.values() if choice == "all" else (STREAM_NUMBERS[choice],)
        )
        self._clear()

    def _clear(self) -> None:
        self._inode = 0
        self._consumed = 0  # records of the index, those of other streams included
        self._newest = 0  # where in the index the last of our records is, plus one
        self.positions, self.offsets, self.times = array("Q"), array("Q"), array("Q")
        self.lengths, self.streams = array("I"), array("B")

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, at: int) -> _Span:
        return _Span(
            self.positions[at],
            STREAM_NAMES[self.streams[at]],
            self.offsets[at],
            self.lengths[at],
            self.times[at],
        )

    @property
    def end(self) -> int:
        """The position after the last record."""
        return self.positions[-1] + self.lengths[-1] if self.positions else 0

    def covered(self, stream: Stream) -> int:
        """How many bytes of the stream's file are named by records."""
        number = STREAM_NUMBERS[stream]
        for at in range(len(self) - 1, -1, -1):
            if self.streams[at] == number:
                return self.offsets[at] + self.lengths[at]
        return 0

    def refresh(self, log_index: Path) -> None:
        """Read what is new. The newest record may have grown, so it is read again."""
        try:
            file = log_index.open("rb")
        except FileNotFoundError:
            self._clear()
            return
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._consumed * RECORD.size:
                self._clear()  # another log, or repaired by a later writer
                self._inode = status.st_ino
            if self._consumed and self._newest == self._consumed:
                for column in (
                    self.positions, self.offsets, self.times, self.lengths, self.streams,
                ):  # fmt: skip
                    column.pop()
            self._consumed = max(0, self._consumed - 1)
            file.seek(self._consumed * RECORD.size)
            data = file.read()
        position = self.end
        for fields in RECORD.iter_unpack(data[: len(data) - len(data) % RECORD.size]):
            time_us, offset, length, stream = fields
            self._consumed += 1
            if stream not in self.numbers:
                continue
            self._newest = self._consumed
            self.positions.append(position)
            self.offsets.append(offset)
            self.times.append(time_us)
            self.lengths.append(length)
            self.streams.append(stream)
            position += length


class LogReader:
    """Reads a log that may still be written to. Blocking, and cheap to make; it keeps the index
    it has read, so that following a log costs only what is new. Not for two threads at once."""

    def __init__(self, stdout: Path, stderr: Path, log_index: Path) -> None:
        self._paths: dict[Stream, Path] = {"stdout": stdout, "stderr": stderr}
        self._log_index = log_index
        self._tracks: dict[StreamChoice, _Track] = {}

    def read(
        self,
        stream: StreamChoice = "all",
        offset: int | None = 0,
        tail_lines: int | None = None,
        size_bytes_max: int = 256 * 1024,
        *,
        is_final: bool = False,
    ) -> LogChunk:
        """Read from a position on, or with offset None the last `tail_lines` lines (None: all).

        The pieces take at most `size_bytes_max` bytes as JSON. Bytes that are not UTF-8 become
        U+FFFD; a character that is not complete yet is left for the next read. `is_final` says
        that nothing more will be written: the end is then reported, and output that no record
        names (its writer was killed in between) is given too.
        """
        view = self._view(stream, is_final=is_final)
        if offset is None:
            offset = 0 if tail_lines is None else self._tail(view, tail_lines)
        offset = max(0, min(offset, view.end))
        budget = max(size_bytes_max, _READ_BYTES_MIN)
        while True:
            pieces, reached = self._pieces(view, offset, budget, is_final=is_final)
            cost = sum(_cost(piece) for piece in pieces)
            if cost <= size_bytes_max or budget == _READ_BYTES_MIN:
                break
            # Control characters take six bytes in JSON, so what fits is known only afterwards.
            budget = max(_READ_BYTES_MIN, min(budget - 1, budget * size_bytes_max // cost))
        return LogChunk(
            pieces=tuple(pieces), next_offset=reached, is_end=is_final and reached >= view.end
        )

    def size(self, stream: StreamChoice = "all", *, is_final: bool = False) -> int:
        """The position of the present end."""
        return self._view(stream, is_final=is_final).end

    def _view(self, stream: StreamChoice, *, is_final: bool) -> "_View":
        track = self._tracks.setdefault(stream, _Track(stream))
        # Sizes first: what is written in between then has its record, and is not taken for a rest.
        names: tuple[Stream, ...] = ("stdout", "stderr") if stream == "all" else (stream,)
        sizes = {name: _size(self._paths[name]) for name in names}
        track.refresh(self._log_index)
        rest: list[_Span] = []
        end = track.end
        # Alone, a stream's order is plain, and what has no record yet can be given at once.
        if is_final or stream != "all":
            for name, size in sizes.items():
                covered = track.covered(name)
                if covered < size:
                    rest.append(_Span(end, name, covered, size - covered, 0))
                    end += size - covered
        return _View(track, tuple(rest), end)

    def _pieces(
        self, view: "_View", offset: int, budget: int, *, is_final: bool
    ) -> tuple[list[LogPiece], int]:
        """Decoded pieces of at most `budget` raw bytes from `offset` on, and where they end."""
        spans = list(_joined(view.spans_from(offset), offset, budget))
        pieces: list[LogPiece] = []
        reached = offset
        for number, span in enumerate(spans):
            data = _read(self._paths[span.stream], span.offset, span.length)
            # In the middle the next piece is of the other stream; only the last can be continued.
            keep = _incomplete(data) if number == len(spans) - 1 else 0
            if is_final and reached + span.length >= view.end:
                keep = 0
            text = data[: len(data) - keep].decode("utf-8", "replace")
            reached += span.length - keep
            if text:
                us = span.time_us
                time = _EPOCH + timedelta(microseconds=us) if 0 < us < _TIME_US_MAX else None
                pieces.append(LogPiece(stream=span.stream, text=text, time=time))
        return pieces, reached

    def _tail(self, view: "_View", lines: int) -> int:
        """The position where the last `lines` lines begin. A last line may lack its newline."""
        if lines <= 0:
            return view.end
        missing = lines
        is_last_byte = True
        for span in view.spans_backwards():
            stop = span.offset + span.length
            while stop > span.offset:
                begin = max(span.offset, stop - _BLOCK_BYTES)
                data = _read(self._paths[span.stream], begin, stop - begin)
                if not data:
                    break
                cut = len(data)
                if is_last_byte and data.endswith(b"\n"):
                    cut -= 1
                is_last_byte = False
                while (at := data.rfind(b"\n", 0, cut)) >= 0:
                    missing -= 1
                    if missing == 0:
                        return span.position + (begin - span.offset) + at + 1
                    cut = at
                stop = begin
        return 0


class _View(NamedTuple):
    """What one read sees: the records, then output without a record, then the end."""

    track: _Track
    rest: tuple[_Span, ...]
    end: int

    def spans_from(self, position: int) -> Iterator[_Span]:
        """All spans that reach beyond a position."""
        first = max(0, bisect.bisect_right(self.track.positions, position) - 1)
        yield from (self.track[at] for at in range(first, len(self.track)))
        yield from self.rest

    def spans_backwards(self) -> Iterator[_Span]:
        """All spans, the last first."""
        yield from reversed(self.rest)
        yield from (self.track[at] for at in range(len(self.track) - 1, -1, -1))


def _joined(spans: Iterator[_Span], offset: int, budget: int) -> Iterator[_Span]:
    """Adjacent spans of one stream joined, from `offset` on, `budget` bytes in all."""
    current: _Span | None = None
    newest_us = 0
    for span in spans:
        skip = max(0, offset - span.position)
        if skip >= span.length:
            continue
        length = min(span.length - skip, budget)
        if length <= 0:
            break
        budget -= length
        start = span.offset + skip
        if (
            current is not None
            and current.stream == span.stream
            and current.offset + current.length == start
            and span.time_us - newest_us <= _JOIN_WITHIN_US
        ):
            current = current._replace(length=current.length + length)
        else:
            if current is not None:
                yield current
            budget -= _PIECE_OVERHEAD_BYTES
            current = _Span(span.position + skip, span.stream, start, length, span.time_us)
        newest_us = span.time_us
    if current is not None:
        yield current


def _incomplete(data: bytes) -> int:
    """How many bytes at the end begin a character whose rest is missing."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-4:])
    return len(decoder.getstate()[0])


def _cost(piece: LogPiece) -> int:
    return _PIECE_OVERHEAD_BYTES + len(json.dumps(piece.text, ensure_ascii=False).encode())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, offset: int, length: int) -> bytes:
    """Bytes of a file; fewer than asked for if it is shorter than its index says."""
    try:
        with path.open("rb") as file:
            if offset >= os.fstat(file.fileno()).st_size:
                return b""
            file.seek(offset)
            return file.read(length)
    except FileNotFoundError:
        return b""
