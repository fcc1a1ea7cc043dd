"""How far the store had come: what is refused at a start, and what is not."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bacalhau.store.mark import PAUSE_SECONDS, HighWaterMark
from bacalhau.store.stream import StreamInfo
from bacalhau_api.errors import TerminalError
from bacalhau_controllers.store import Cursor
from tests.support.simclock import SimClock, SimLoop


def info(created: str = "t1", last: int = 100) -> StreamInfo:
    return StreamInfo(created, last, datetime(2026, 1, 1, tzinfo=UTC), 1)


def kept(path: Path, revision: int, epoch: str = "t1") -> HighWaterMark:
    """A mark at which an orchestrator stopped."""
    mark = HighWaterMark(path)
    mark._note(Cursor(epoch, revision))
    return HighWaterMark(path)


@pytest.mark.parametrize("found", [info(), info(last=1000)])
def test_a_store_that_is_what_it_was_is_taken(tmp_path: Path, found: StreamInfo) -> None:
    kept(tmp_path / "mark", 100).check(found)
    HighWaterMark(tmp_path / "none").check(found)


@pytest.mark.parametrize(
    ("found", "said"),
    [(info(last=99), "ends at revision 99"), (info("t2", 1000), "is a new one")],
)
def test_a_store_that_lost_something_is_refused(
    tmp_path: Path, found: StreamInfo, said: str
) -> None:
    path = tmp_path / "mark"
    with pytest.raises(TerminalError, match=f"{said}, although it had come to revision 100") as no:
        kept(path, 100).check(found)
    assert f"delete {path}" in no.value.hint
    path.unlink()
    HighWaterMark(path).check(found)


def test_a_loss_that_was_seen_while_running_is_no_news(tmp_path: Path) -> None:
    """A watch that found the stream shorter gave it another epoch, and went on."""
    mark = kept(tmp_path / "mark", 100)
    mark.check(info())
    mark._note(Cursor("t1~1700000000.000000", 60))
    HighWaterMark(tmp_path / "mark").check(info(last=60))


@pytest.mark.parametrize("text", ["", "{", "5", "{}", '{"created": "t1", "revision": "x"}'])
def test_a_mark_that_says_nothing_stands_in_nobodys_way(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "mark"
    path.write_text(text)
    HighWaterMark(path).check(info())
    assert "Cannot tell how far the store had come" in caplog.text


def test_the_mark_follows_the_store_and_has_its_end(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    at = [Cursor("t1", 5)]
    with SimLoop() as loop:
        keeping = loop.create_task(HighWaterMark(path).keep(lambda: at[0], SimClock(loop)))
        loop.advance(PAUSE_SECONDS)
        at[0] = Cursor("t1", 9)
        keeping.cancel()
        loop.run_until_complete(asyncio.wait({keeping}))
    assert json.loads(path.read_text()) == {"created": "t1", "revision": 9}


def test_a_disk_that_takes_no_mark_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    HighWaterMark(tmp_path / "gone" / "mark")._note(Cursor("t1", 5))
    assert "Failed to note how far the store is" in caplog.text
