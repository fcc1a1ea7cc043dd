"""Reading a log on over new connections: nothing twice, nothing left out."""

from hypothesis import given
from hypothesis import strategies as st

from bacalhau.client.logposition import LogPosition, can_go_on
from bacalhau.replies import LogRecord


def record(text: str, offset: int | None = None, stream: str = "stdout") -> LogRecord:
    return LogRecord(execution="e", slot="0", stream=stream, text=text, offset=offset)


def taken(position: LogPosition, *records: LogRecord) -> str:
    return "".join(fresh.text for given in records for fresh in position.take(given))


def test_what_came_after_the_last_offset_is_not_shown_again() -> None:
    position = LogPosition(has_tail=False)
    assert taken(position, record("one\n"), record("two\n", 8), record("thr")) == "one\ntwo\nthr"
    assert position.offsets == {"e": 8}
    position.broke()
    assert taken(position, record("three\n", 14)) == "ee\n"
    position.broke()
    assert taken(position, record("four\n", 19)) == "four\n"


def test_streams_are_counted_apart() -> None:
    position = LogPosition(has_tail=False)
    taken(position, record("out"), record("err", stream="stderr"))
    position.broke()
    again = [record("err!", stream="stderr"), record("out?")]
    assert taken(position, *again) == "!?"


def test_a_break_while_reading_again() -> None:
    position = LogPosition(has_tail=False)
    assert taken(position, record("abcdef")) == "abcdef"
    position.broke()
    assert taken(position, record("abc")) == ""
    position.broke()
    assert taken(position, record("abc"), record("defg", 7)) == "g"


def test_of_a_tail_nothing_is_shown_until_its_place_is_known() -> None:
    position = LogPosition(has_tail=True)
    assert taken(position, record("a"), record("b")) == ""
    position.broke()
    assert position.offsets == {}
    assert taken(position, record("b"), record("c", 9)) == "bc"
    assert taken(position, record("d")) == "d"
    position.broke()
    assert taken(position, record("de")) == "e"


def test_the_end_gives_what_was_held_back() -> None:
    position = LogPosition(has_tail=True)
    assert taken(position, record("a")) == ""
    assert [r.text for r in position.rest()] == ["a"]
    assert list(position.rest()) == []


def test_notices_pass() -> None:
    position = LogPosition(has_tail=True)
    notice = LogRecord(execution="e", notice="node n is away")
    assert list(position.take(notice)) == [notice]


def test_a_log_on_a_node_that_is_away_is_not_waited_for() -> None:
    assert can_go_on("ServerClosing")
    assert can_go_on("ConnectionFailed")
    assert not can_go_on("NodeAway")


@given(
    pieces=st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.text(min_size=1)), max_size=20),
    reads=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.booleans()), max_size=20),
)  # fmt: skip
def test_any_breaks_leave_each_stream_whole(
    pieces: list[tuple[str, str]], reads: list[tuple[int, int, bool]]
) -> None:
    """A log of pieces; `offset` counts them. Each read sends so many pieces, of which so many
    arrive before the connection breaks; the last piece of a whole read has its offset."""
    position, shown, at = LogPosition(has_tail=False), {"stdout": "", "stderr": ""}, 0

    def receive(start: int, count: int, arriving: int) -> int:
        chunk = pieces[start : start + count]
        for i, (stream, text) in enumerate(chunk[:arriving]):
            end = start + len(chunk) if i + 1 == len(chunk) else None
            for fresh in position.take(record(text, end, stream)):
                shown[fresh.stream] += fresh.text
        return start + len(chunk)

    for count, arriving, breaks in [*reads, (len(pieces) + 1, len(pieces) + 1, False)]:
        following = receive(at, count, arriving)
        if breaks or arriving < count:
            position.broke()
            at = position.offsets.get("e", 0)
        else:
            at = following
    for stream, seen in shown.items():
        assert seen == "".join(text for name, text in pieces if name == stream)
