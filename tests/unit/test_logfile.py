"""Logs: what was written is what is read, in order, whatever crashed in between."""

import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from bacalhau.engines.logfile import LogReader, LogWriter, OutputLimitError, Stream, StreamChoice
from bacalhau.engines.logwriter import RECORD, read_records
from bacalhau_api.wire import LogChunk


class Log:
    """The three files of a log."""

    def __init__(self, directory: Path) -> None:
        self.paths = (directory / "stdout", directory / "stderr", directory / "log.idx")
        self.stdout, self.stderr, self.index = self.paths

    def writer(self, bytes_max: int = 1 << 30) -> LogWriter:
        return LogWriter(*self.paths, bytes_max=bytes_max)

    def reader(self) -> LogReader:
        return LogReader(*self.paths)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the writer's clock; call it to move on by so many seconds."""
    now = [1_700_000_000.0]
    monkeypatch.setattr(time, "time_ns", lambda: int(now[0] * 1e9))

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


def text(chunk: LogChunk) -> str:
    return "".join(piece.text for piece in chunk.pieces)


def pieces(chunk: LogChunk) -> list[tuple[str, str]]:
    return [(piece.stream, piece.text) for piece in chunk.pieces]


def read_all(log: Log, stream: StreamChoice, size: int, *, is_final: bool = True) -> str:
    """Read in pieces, each by a new reader that knows only the position."""
    out, at = "", 0
    while True:
        chunk = log.reader().read(stream, at, size_bytes_max=size, is_final=is_final)
        out += text(chunk)
        if chunk.is_end or chunk.next_offset == at:
            return out
        at = chunk.next_offset


def test_index_is_as_documented(log: Log, clock: Callable[[float], None]) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"one\n")
        clock(1)
        writer.write("stderr", b"two\n")
        clock(1)
        writer.write("stdout", b"three\n")
    assert log.stdout.read_bytes() == b"one\nthree\n"
    assert log.stderr.read_bytes() == b"two\n"
    us = 1_700_000_000_000_000
    assert list(RECORD.iter_unpack(log.index.read_bytes())) == [
        (us, 0, 4, 1),
        (us + 1_000_000, 0, 4, 2),
        (us + 2_000_000, 4, 6, 1),
    ]


def test_streams_alone_and_together(log: Log, clock: Callable[[float], None]) -> None:
    with log.writer() as writer:
        for stream, data in (("stdout", b"a\n"), ("stderr", b"b\n"), ("stdout", b"c\n")):
            writer.write(stream, data)  # type: ignore[arg-type]
            clock(1)
    reader = log.reader()
    assert pieces(reader.read("all")) == [("stdout", "a\n"), ("stderr", "b\n"), ("stdout", "c\n")]
    assert text(reader.read("stdout")) == "a\nc\n"
    assert text(reader.read("stderr")) == "b\n"
    times = [piece.time for piece in reader.read("all").pieces]
    assert [t.timestamp() if t else None for t in times] == [
        1_700_000_000.0,
        1_700_000_001.0,
        1_700_000_002.0,
    ]


def test_log_that_is_not_there_yet(log: Log) -> None:
    reader = log.reader()
    assert reader.read("all") == LogChunk()
    assert reader.read("stdout", None, 10) == LogChunk()
    assert reader.read("all", is_final=True) == LogChunk(is_end=True)
    with log.writer() as writer:
        writer.write("stdout", b"now")
        assert text(reader.read("all")) == "now"


def test_byte_by_byte_output_keeps_the_index_small(
    log: Log, clock: Callable[[float], None]
) -> None:
    with log.writer() as writer:
        for _ in range(10_000):
            writer.write("stdout", b"x")
            clock(0.000_01)
    assert len(read_records(log.index)) <= 25
    assert text(log.reader().read("all")) == "x" * 10_000


def test_index_stays_bounded_over_years(log: Log, clock: Callable[[float], None]) -> None:
    """As if there had been many records before: the interval within which writes join grows."""
    with log.writer() as writer:
        writer.write("stdout", b"x")
        writer._index_end = 600_000 * RECORD.size
        writer._last = None
        for _ in range(100):
            writer.write("stdout", b"x")
            clock(0.1)
        assert writer._index_end <= 600_004 * RECORD.size


def test_reader_sees_the_newest_record_grow(log: Log, clock: Callable[[float], None]) -> None:
    reader, at, seen = log.reader(), 0, ""
    with log.writer() as writer:
        for number in range(50):
            writer.write("stdout", f"{number} ".encode())
            chunk = reader.read("all", at)
            seen, at = seen + text(chunk), chunk.next_offset
    assert seen == "".join(f"{n} " for n in range(50))
    assert len(read_records(log.index)) == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr", "all"])
@pytest.mark.parametrize("size", [1, 7, 100, 100_000])
def test_reading_in_pieces_gives_the_whole(
    log: Log, clock: Callable[[float], None], stream: StreamChoice, size: int
) -> None:
    rng = random.Random(size)
    words = ["plain\n", "ümläut ", "日本語\n", "🐟🐟", "\x1b[0m", "\0\n"]
    whole: dict[str, str] = {"stdout": "", "stderr": "", "all": ""}
    with log.writer() as writer:
        for _ in range(120):
            word = rng.choice(words)
            name: Stream = rng.choice(("stdout", "stderr"))
            writer.write(name, word.encode())
            whole[name] += word
            whole["all"] += word
            clock(rng.choice((0.0, 0.2)))
    assert read_all(log, stream, size) == whole[stream]


def test_pieces_stay_within_the_size_as_json(log: Log, clock: Callable[[float], None]) -> None:
    with log.writer() as writer:
        for _ in range(300):
            writer.write("stdout", b"\0" * 100)
            writer.write("stderr", b"\xff" * 100)
            clock(1)
    at = 0
    while True:
        chunk = log.reader().read("all", at, size_bytes_max=10_000, is_final=True)
        assert len(chunk.encode()) <= 10_000 + 100
        if chunk.is_end:
            break
        assert chunk.next_offset > at
        at = chunk.next_offset


def test_character_that_is_not_complete_waits(log: Log) -> None:
    fish = "🐟".encode()
    reader = log.reader()
    for stream in ("stdout", "all"):
        with log.writer() as writer:
            start = reader.size(stream)
            writer.write("stdout", b"ab" + fish[:2])
            chunk = reader.read(stream, start)
            assert (text(chunk), chunk.next_offset) == ("ab", start + 2)
            writer.write("stdout", fish[2:])
            assert text(reader.read(stream, chunk.next_offset)) == "🐟"


def test_character_that_never_gets_complete_is_given_at_the_end(log: Log) -> None:
    with log.writer() as writer:
        writer.write("stdout", "🐟".encode()[:3])
    assert text(log.reader().read("all")) == ""
    chunk = log.reader().read("all", is_final=True)
    assert (text(chunk), chunk.is_end) == ("\ufffd", True)


def test_end_is_told_only_when_it_is_reached(log: Log) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"x" * 1000)
    reader = log.reader()
    assert not reader.read("all").is_end
    first = reader.read("all", size_bytes_max=500, is_final=True)
    assert not first.is_end
    assert reader.read("all", first.next_offset, size_bytes_max=5000, is_final=True).is_end


def test_position_beyond_the_end(log: Log) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"abc")
    assert log.reader().read("all", 99) == LogChunk(next_offset=3)
    assert text(log.reader().read("all", -5)) == "abc"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(0, ""), (1, "e5\n"), (2, "o4\ne5\n"), (3, "o3\no4\ne5\n"), (6, None), (99, None)],
)
def test_last_lines(
    log: Log, clock: Callable[[float], None], lines: int, expected: str | None
) -> None:
    with log.writer() as writer:
        for number in range(6):
            stream: Stream = "stderr" if number in (1, 5) else "stdout"
            writer.write(stream, f"{stream[3]}{number}\n".replace("d", "o").encode())
            clock(1)
    whole = text(log.reader().read("all"))
    assert whole.splitlines()[-1].endswith("5")
    got = text(log.reader().read("all", None, lines))
    if expected is None:
        assert got == whole
    else:
        assert got == "".join(whole.splitlines(keepends=True)[len(whole.splitlines()) - lines :])


def test_last_lines_of_a_line_without_end_and_of_long_lines(log: Log) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"x" * 200_000 + b"\n" + b"y" * 150_000 + b"\nlast")
    reader = log.reader()
    assert text(reader.read("stdout", None, 1)) == "last"
    two = reader.read("stdout", None, 2, size_bytes_max=1 << 20)
    assert text(two) == "y" * 150_000 + "\nlast"


def test_limit_cuts_exactly(log: Log) -> None:
    with log.writer(bytes_max=10) as writer:
        writer.write("stdout", b"12345678")
        writer.write("stderr", b"1234567890")
        with pytest.raises(OutputLimitError) as caught:
            writer.write("stdout", b"90abc")
        assert caught.value.stream == "stdout"
        with pytest.raises(OutputLimitError):
            writer.write("stderr", b"x")
    assert log.stdout.read_bytes() == b"1234567890"
    assert log.stderr.read_bytes() == b"1234567890"
    assert log.reader().size("all") == 20


def test_next_run_appends_and_has_the_limit_to_itself(log: Log) -> None:
    for number in range(3):
        with log.writer(bytes_max=10) as writer:
            writer.write("stdout", f"run {number}\n".encode())
    assert text(log.reader().read("all")) == "run 0\nrun 1\nrun 2\n"


@pytest.mark.parametrize("torn", range(1, RECORD.size))
def test_torn_record(log: Log, clock: Callable[[float], None], torn: int) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"first\n")
        clock(1)
        writer.write("stderr", b"second\n")
    log.index.write_bytes(log.index.read_bytes()[:-torn])
    assert text(log.reader().read("all")) == "first\n"
    assert pieces(log.reader().read("all", is_final=True)) == [
        ("stdout", "first\n"),
        ("stderr", "second\n"),
    ]
    position = log.reader().read("all").next_offset
    with log.writer() as writer:
        writer.write("stdout", b"third\n")
    assert log.index.stat().st_size % RECORD.size == 0
    assert text(log.reader().read("all")) == "first\nsecond\nthird\n"
    assert text(log.reader().read("all", position)) == "second\nthird\n"


def test_output_without_a_record(log: Log) -> None:
    with log.writer() as writer:
        writer.write("stdout", b"known ")
    with log.stdout.open("ab") as file:
        file.write(b"unknown ")
    assert text(log.reader().read("all")) == "known "
    assert text(log.reader().read("stdout")) == "known unknown "
    final = log.reader().read("all", is_final=True)
    assert (text(final), final.next_offset, final.is_end) == ("known unknown ", 14, True)
    with log.writer() as writer:
        writer.write("stdout", b"new")
    assert text(log.reader().read("all", final.next_offset)) == "new"


def test_records_whose_output_was_lost_with_the_power(
    log: Log, clock: Callable[[float], None]
) -> None:
    with log.writer() as writer:
        for number in range(4):
            writer.write("stdout", f"line {number}\n".encode())
            writer.write("stderr", b"e")
            clock(1)
    with log.stdout.open("r+b") as file:
        file.truncate(10)  # in the middle of line 1
    assert read_all(log, "all", 1000) == "line 0\nelineee"
    with log.writer() as writer:
        writer.write("stdout", b"|after\n")
    assert read_all(log, "all", 1000) == "line 0\nelineee|after\n"
    records = read_records(log.index)
    assert all(r.length > 0 for r in records)
    stdout = [r for r in records if r.stream == 1]
    assert [b.offset for _, b in pairwise(stdout)] == [
        a.offset + a.length for a, _ in pairwise(stdout)
    ]


def test_index_of_another_log_is_read_anew(log: Log) -> None:
    reader = log.reader()
    with log.writer() as writer:
        writer.write("stdout", b"a long first run\n")
    assert text(reader.read("all")) == "a long first run\n"
    for path in log.paths:
        path.unlink()
    with log.writer() as writer:
        writer.write("stdout", b"second\n")
    assert text(reader.read("all")) == "second\n"


def test_log_files_are_not_followed_through_links(log: Log, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("")
    log.stdout.symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"):
        log.writer()
    assert (tmp_path / "victim").read_text() == ""


def test_fuzzed_index_never_breaks_the_reader(log: Log) -> None:
    rng = random.Random(7)
    with log.writer() as writer:
        writer.write("stdout", b"some output\n" * 50)
        writer.write("stderr", b"more\n" * 50)
    good = log.index.read_bytes()
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        log.index.write_bytes(bad)
        chunk = log.reader().read("all", rng.randrange(0, 800), size_bytes_max=500, is_final=True)
        assert chunk.next_offset >= 0
        log.reader().read("all", None, 3)
        log.writer().close()
        assert read_all(log, "stdout", 100_000) == "some output\n" * 50
