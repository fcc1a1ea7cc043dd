"""Brings the engine's log of one container into the node's common format, while it runs and after.

The engine keeps the log from its first byte for as long as the container exists. So a follower that
begins anew (the agent was killed, the engine was started again) reads from the beginning and leaves
out as many bytes of each stream as the node's files already hold of this run: no hole, no repeat,
whatever was cut where.
"""

import contextlib
import itertools
import operator
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from bacalhau.engines.docker.client import EngineClient
from bacalhau.engines.docker.records import Record
from bacalhau.engines.logfile import LogWriter, OutputLimitError, Stream

_HEADER_BYTES = 8
_STREAMS: dict[int, Stream] = {1: "stdout", 2: "stderr"}
_NO_LIMIT = 1 << 62


class FrameError(Exception):
    """The engine's stream is not in frames."""


class Frames:
    """Takes a stream of frames (1 byte stream, 3 zero, 4 length, payload) apart, however it is cut
    up; a payload that is long is given in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._stream: Stream = "stdout"
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[Stream, bytes]]:
        """The payload in `data`, with the stream it belongs to."""
        data = self._rest + data if self._rest else data
        at = 0
        while at < len(data):
            if not self._left:
                if len(data) - at < _HEADER_BYTES:
                    break
                number = data[at]
                if number not in _STREAMS or data[at + 1 : at + 4] != b"\0\0\0":
                    raise FrameError(f"the log has a frame of unknown kind {data[at : at + 8]!r}")
                self._stream = _STREAMS[number]
                self._left = int.from_bytes(data[at + 4 : at + 8], "big")
                at += _HEADER_BYTES
                continue
            piece = data[at : at + self._left]
            self._left -= len(piece)
            at += len(piece)
            yield self._stream, piece
        self._rest = data[at:]


class LogCopy:
    """Writes one run's log. `follow` may be called again, one call at a time."""

    def __init__(self, client: EngineClient, container: str, record: Record) -> None:
        self._client = client
        self._container = container
        self._record = record
        self._starts: dict[Stream, int] = {"stdout": record.stdout_at, "stderr": record.stderr_at}
        self._paths: dict[Stream, Path] = {
            "stdout": Path(record.stdout),
            "stderr": Path(record.stderr),
        }

    async def follow(self, *, live: bool) -> None:
        """Return at the end of the log: with `live`, once the container has ended.

        Raises OutputLimitError once a stream is longer than it may be (it was cut there),
        UnavailableError if the engine breaks off, OSError if the disk is full.
        """
        written = {stream: self._written(stream) for stream in self._paths}
        skip = dict(written)
        writer = LogWriter(
            self._paths["stdout"],
            self._paths["stderr"],
            Path(self._record.log_index),
            bytes_max=_NO_LIMIT,
        )
        with writer:
            async with contextlib.aclosing(self._frames(live=live)) as frames:
                async for stream, data in frames:
                    self._take(writer, stream, data, written, skip)

    def _take(
        self,
        writer: LogWriter,
        stream: Stream,
        data: bytes,
        written: dict[Stream, int],
        skip: dict[Stream, int],
    ) -> None:
        """Write what the file does not hold yet."""
        if skip[stream]:
            known = min(skip[stream], len(data))
            skip[stream] -= known
            data = data[known:]
        room = self._record.output_bytes_max - written[stream]
        if data and room > 0:
            writer.write(stream, data[:room])
            written[stream] += min(len(data), room)
        if len(data) > room:
            raise OutputLimitError(stream, self._record.output_bytes_max)

    async def _frames(self, *, live: bool) -> AsyncGenerator[tuple[Stream, bytes], None]:
        frames = Frames()
        params = {"stdout": 1, "stderr": 1, "follow": int(live)}
        path = f"/containers/{self._container}/logs"
        answer = self._client.raw(path, params, may_pause=live)
        async with contextlib.aclosing(answer) as chunks:
            async for data in chunks:
                # Each line is a frame of its own; what belongs together is written at once.
                for stream, pieces in itertools.groupby(frames.feed(data), operator.itemgetter(0)):
                    yield stream, b"".join(piece for _, piece in pieces)

    def _written(self, stream: Stream) -> int:
        try:
            size = self._paths[stream].stat().st_size
        except FileNotFoundError:
            return 0
        return max(0, size - self._starts[stream])
