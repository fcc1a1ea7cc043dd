"""The limit of what a node sends, in virtual time: how much, in which order, and for how long
anybody waits."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest

from bacalhau.nats.transport import Transport
from bacalhau.node.link import NatsLink
from bacalhau.node.reader import PIECE_BYTES_MAX, OutputReader
from bacalhau.node.upload import (
    PATIENCE_SECONDS,
    PIECE_BYTES_MIN,
    Kind,
    UploadGate,
)
from bacalhau_api.errors import UnavailableError
from bacalhau_api.v1.node import NodeInfo
from bacalhau_api.wire import (
    Applied,
    Assignments,
    Changes,
    Hello,
    LogChunk,
    LogPiece,
    LogRead,
    OutputRead,
)
from tests.support.simclock import SimClock, SimLoop

RATE = 100_000


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with SimLoop() as loop:
        yield loop


class Sender:
    """Notes what passes the gate, and when."""

    def __init__(self, loop: SimLoop, rate: int = RATE) -> None:
        self.loop = loop
        self.gate = UploadGate(rate, SimClock(loop))
        self.sent: list[tuple[float, str, int]] = []
        self.refused: list[str] = []

    def send(self, name: str, size: int, kind: Kind = Kind.RESULT) -> None:
        """Send without waiting for it here."""

        async def go() -> None:
            try:
                await self.gate.take(size, kind)
            except UnavailableError:
                self.refused.append(name)
            else:
                self.sent.append((self.loop.time(), name, size))

        self.loop.create_task(go())

    def bytes_until(self, at: float) -> int:
        return sum(size for when, _, size in self.sent if when <= at)


def test_without_a_limit_nothing_waits(loop: SimLoop) -> None:
    sender = Sender(loop, rate=0)
    for number in range(100):
        sender.send(str(number), 1 << 20)
    loop.run_until_idle()
    assert len(sender.sent) == 100
    assert sender.gate.piece_bytes(PIECE_BYTES_MAX) == PIECE_BYTES_MAX


def test_over_time_no_more_than_the_limit_is_sent(loop: SimLoop) -> None:
    sender = Sender(loop)
    start = loop.time()

    async def download() -> None:
        while True:
            size = sender.gate.piece_bytes(PIECE_BYTES_MAX)
            await sender.gate.take(size, Kind.RESULT)
            sender.sent.append((loop.time(), "d", size))

    loop.create_task(download())
    for seconds in (1, 10, 60):
        loop.run_until_complete(asyncio.ensure_future(_sleep(loop, start + seconds), loop=loop))
        sent = sender.bytes_until(start + seconds)
        piece = sender.gate.piece_bytes(PIECE_BYTES_MAX)
        assert RATE * seconds - piece <= sent <= RATE * (seconds + 1) + piece
    assert sender.gate.piece_bytes(PIECE_BYTES_MAX) == RATE // 2


async def _sleep(loop: SimLoop, until: float) -> None:
    await SimClock(loop).sleep(until - loop.time())


def test_logs_go_before_results_that_came_earlier(loop: SimLoop) -> None:
    sender = Sender(loop)
    sender.send("first", 2 * RATE)
    loop.run_until_idle()
    for number in range(3):
        sender.send(f"result-{number}", RATE)
    loop.run_until_idle()
    sender.send("log", RATE, Kind.LOG)
    loop.advance(8)
    assert [name for _, name, _ in sender.sent] == [
        "first", "log", "result-0", "result-1", "result-2",
    ]  # fmt: skip


def test_facts_wait_for_nobody_and_the_rest_makes_room(loop: SimLoop) -> None:
    quiet, busy = Sender(loop), Sender(loop)
    busy.gate.spend(3 * RATE)
    for sender in (quiet, busy):
        sender.send("result", 1000)
    loop.advance(2.9)
    assert [name for _, name, _ in quiet.sent] == ["result"]
    assert not busy.sent
    loop.advance(0.2)
    assert [name for _, name, _ in busy.sent] == ["result"]


def test_what_would_come_too_late_is_not_sent(loop: SimLoop) -> None:
    sender = Sender(loop)
    sender.gate.spend(int(2 * PATIENCE_SECONDS * RATE))
    sender.send("late", 1000)
    loop.advance(PATIENCE_SECONDS + 0.1)
    assert sender.refused == ["late"]
    loop.advance(PATIENCE_SECONDS)
    sender.send("again", 1000)
    loop.run_until_idle()
    assert [name for _, name, _ in sender.sent] == ["again"], "nothing was taken for the refused"


def test_who_goes_away_leaves_the_queue(loop: SimLoop) -> None:
    sender = Sender(loop)
    sender.gate.spend(RATE)
    task = loop.create_task(sender.gate.take(1000, Kind.LOG))
    loop.run_until_idle()
    sender.send("next", 1000)
    loop.advance(0.5)
    task.cancel()
    loop.advance(1)
    assert [name for _, name, _ in sender.sent] == ["next"]


def test_a_small_limit_still_has_pieces_of_some_size(loop: SimLoop) -> None:
    assert UploadGate(1024, SimClock(loop)).piece_bytes(PIECE_BYTES_MAX) == PIECE_BYTES_MIN


# -- in the link -----------------------------------------------------------------------------------


class Line:
    """Stands in for NATS: keeps what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, dict[str, str] | None]] = []
        self.is_connected = True

    async def publish(
        self, subject: str, payload: bytes = b"", *, reply: str = "", headers: Any = None
    ) -> None:
        self.published.append((subject, payload, headers))

    async def request(self, subject: str, payload: bytes, **_: Any) -> Any:
        raise UnavailableError("nobody there")


class Message:
    def __init__(self, verb: str, data: bytes) -> None:
        self.subject, self.reply, self.data, self.headers = f"agent.n1.{verb}", verb, data, None


class Reader:
    """A node with one large file and one large log."""

    async def read_output(self, ask: OutputRead) -> bytes:
        return b"x" * min(ask.size_bytes_max, 1_000_000 - ask.offset)

    async def read_log(self, ask: LogRead) -> LogChunk:
        return LogChunk(pieces=(LogPiece(stream="stdout", text="y" * ask.size_bytes_max),))


async def _ask(link: NatsLink, line: Line, verb: str, message: Any) -> tuple[bytes, Any]:
    await link._received(cast(Any, Message(verb, message.encode())))
    while not any(subject == verb for subject, _, _ in line.published):
        await asyncio.gather(*link._reads)
    return next((d, h) for subject, d, h in reversed(line.published) if subject == verb)


def test_the_link_keeps_to_the_limit(loop: SimLoop) -> None:
    line = Line()
    gate = UploadGate(RATE, SimClock(loop))
    link = NatsLink("n1", cast(Transport, line), cast(OutputReader, Reader()), gate)
    names: dict[str, Any] = {"node": "n1", "session": "s", "namespace": "default", "execution": "e"}

    async def main() -> None:
        with pytest.raises(UnavailableError):
            await link.request("hello", Hello(incarnation="i", info=NodeInfo(), **_of(names)))
        read = OutputRead(path="big", size_bytes_max=PIECE_BYTES_MAX, **names)
        data, headers = await _ask(link, line, "outputs.read", read)
        assert (len(data), headers) == (RATE // 2, None)
        log = LogRead(size_bytes_max=PIECE_BYTES_MAX, **names)
        data, _ = await _ask(link, line, "logs", log)
        assert RATE // 2 <= len(data) < RATE // 2 + 200
        gate.spend(int(RATE * PATIENCE_SECONDS * 3))
        line.published.clear()
        data, headers = await _ask(link, line, "outputs.read", read)
        assert not data
        assert headers["Busy"] == "1"
        assert "upload limit" in headers["Error"]

    loop.run_until_complete(asyncio.ensure_future(main(), loop=loop))


def test_reads_are_not_held_up_behind_changes(loop: SimLoop) -> None:
    """Which wait for a list that a full disk may keep from being taken."""
    line = Line()
    link = NatsLink("n1", cast(Transport, line), cast(OutputReader, Reader()))
    names: dict[str, Any] = {"node": "n1", "session": "s", "namespace": "default", "execution": "e"}
    applied: list[int] = []
    is_taken = asyncio.Event()

    async def apply(changes: Changes) -> Applied | None:
        await is_taken.wait()
        applied.append(changes.number)
        return Applied(**_of(names), number=changes.number)

    async def main() -> None:
        link._on_changes = apply
        with pytest.raises(UnavailableError):
            await link.request("hello", Hello(incarnation="i", info=NodeInfo(), **_of(names)))
        for number in (1, 2, 3):
            changes = Changes(number=number, assignments=Assignments(), **_of(names))
            async with asyncio.timeout(1):
                await link._received(cast(Any, Message("changes", changes.encode())))
        data, _ = await _ask(link, line, "logs", LogRead(size_bytes_max=100, **names))
        assert data
        is_taken.set()
        await asyncio.sleep(0)
        await link.close()
        assert applied == [1, 2, 3]

    loop.run_until_complete(asyncio.ensure_future(main(), loop=loop))


def _of(names: dict[str, Any]) -> dict[str, Any]:
    return {key: names[key] for key in ("node", "session")}
