"""Reads of logs and outputs from the node's disk."""

import asyncio
from pathlib import Path

import pytest

from bacalhau.engines.logfile import LogWriter
from bacalhau.node.reader import PIECE_BYTES_MAX, OutputReader
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.system import SystemClock
from bacalhau_api.errors import NotFoundError, UnavailableError
from bacalhau_api.wire import LogRead, OutputRead, OutputsList
from bacalhau_controllers.runner.ports import Layout


class Executions:
    """One execution, `a`; all others are unknown."""

    def __init__(self) -> None:
        self.is_a_over = False
        self.has_a_outputs = True

    def is_over(self, namespace: str, name: str) -> bool | None:
        return self.is_a_over if (namespace, name) == ("default", "a") else None

    def keeps_outputs(self, namespace: str, name: str) -> bool:
        return self.has_a_outputs


class Place:
    """A workspace with one execution, its log and a reader."""

    def __init__(self, workspace: DiskWorkspace, layout: Layout) -> None:
        self.layout = layout
        self.executions = Executions()
        self.reader = OutputReader(workspace, SystemClock())
        self.reader.bind(self.executions)
        self.log = LogWriter(
            layout.stdout, layout.stderr, layout.log_index, bytes_max=10 * 1024 * 1024
        )


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    workspace = DiskWorkspace(tmp_path, SystemClock())
    layout = workspace.layout("default", "a")
    await workspace.begin_run(layout, 1, ["r"], reset=True)
    return Place(workspace, layout)


def log(**options: object) -> LogRead:
    fields: dict[str, object] = {"node": "n", "session": "s", "namespace": "default"}
    return LogRead.model_validate(fields | {"execution": "a"} | options)


def listing(after: str = "") -> OutputsList:
    return OutputsList(node="n", session="s", namespace="default", execution="a", after=after)


def piece(path: str, offset: int = 0, size: int = 100) -> OutputRead:
    return OutputRead(
        node="n",
        session="s",
        namespace="default",
        execution="a",
        path=path,
        offset=offset,
        size_bytes_max=size,
    )


async def test_a_log_is_read_in_order_to_its_end(place: Place) -> None:
    place.log.write("stdout", b"one\n")
    place.log.write("stderr", b"two\n")
    first = await place.reader.read_log(log())
    assert [(p.stream, p.text) for p in first.pieces] == [("stdout", "one\n"), ("stderr", "two\n")]
    assert not first.is_end
    place.log.write("stdout", b"three\n")
    place.log.close()
    place.executions.is_a_over = True
    rest = await place.reader.read_log(log(offset=first.next_offset))
    assert [p.text for p in rest.pieces] == ["three\n"]
    assert rest.is_end


async def test_a_waiting_read_wakes_when_something_is_written(place: Place) -> None:
    reading = asyncio.create_task(place.reader.read_log(log(wait_seconds=20)))
    await asyncio.sleep(0.1)
    assert not reading.done()
    place.log.write("stderr", b"news\n")
    async with asyncio.timeout(5):
        chunk = await reading
    assert [p.text for p in chunk.pieces] == ["news\n"]


async def test_a_waiting_read_wakes_at_the_end(place: Place) -> None:
    reading = asyncio.create_task(place.reader.read_log(log(wait_seconds=20)))
    await asyncio.sleep(0.1)
    place.executions.is_a_over = True
    async with asyncio.timeout(5):
        chunk = await reading
    assert chunk.is_end


async def test_a_read_waits_no_longer_than_asked(place: Place) -> None:
    writing = asyncio.create_task(chatter(place))
    async with asyncio.timeout(5):  # the other stream does not satisfy it, nor keep it
        chunk = await place.reader.read_log(log(stream="stdout", wait_seconds=0.3))
    writing.cancel()
    assert chunk.pieces == ()
    assert not chunk.is_end


async def chatter(place: Place) -> None:
    while True:
        place.log.write("stderr", b"x")
        await asyncio.sleep(0.01)


async def test_the_last_lines(place: Place) -> None:
    place.log.write("stdout", b"".join(b"%d\n" % n for n in range(100)))
    chunk = await place.reader.read_log(log(offset=None, tail_lines=3))
    assert "".join(p.text for p in chunk.pieces) == "97\n98\n99\n"


async def test_pieces_are_bounded_whatever_is_asked(place: Place) -> None:
    place.log.write("stdout", b"x" * (2 * PIECE_BYTES_MAX))
    chunk = await place.reader.read_log(log(size_bytes_max=1 << 40))
    assert len(chunk.encode()) <= PIECE_BYTES_MAX + 1024
    chunk = await place.reader.read_log(log(size_bytes_max=-5))
    assert chunk.next_offset > 0


async def test_many_readers_of_one_log_see_the_same(place: Place) -> None:
    place.log.write("stdout", b"line\n" * 1000)
    chunks = await asyncio.gather(*(place.reader.read_log(log()) for _ in range(20)))
    assert len({chunk.encode() for chunk in chunks}) == 1


async def test_what_is_not_here_is_said(place: Place) -> None:
    unknown = await place.reader.read_log(log(execution="b"))
    assert "does not know" in unknown.error
    page = await place.reader.list_outputs(listing().but(execution="../a"))
    assert "does not know" in page.error
    place.executions.has_a_outputs = False
    assert "no outputs" in (await place.reader.read_log(log())).error
    assert "no outputs" in (await place.reader.list_outputs(listing())).error
    with pytest.raises(NotFoundError):
        await place.reader.read_output(piece("stdout"))


async def test_before_the_agent_is_there(tmp_path: Path) -> None:
    reader = OutputReader(DiskWorkspace(tmp_path, SystemClock()), SystemClock())
    with pytest.raises(UnavailableError):
        await reader.read_log(log())


async def test_outputs_are_listed_in_pages(place: Place) -> None:
    names = [f"f{n:04}" for n in range(2500)]
    for name in names:
        (place.layout.result("r") / name).write_text(name)
    (place.layout.result("r") / "link").symlink_to("/etc/passwd")
    place.executions.is_a_over = True
    found: list[str] = []
    after = ""
    for _ in range(10):
        page = await place.reader.list_outputs(listing(after))
        assert len(page.encode()) < 512 * 1024
        found += [file.path for file in page.files]
        after = found[-1]
        if page.is_last:
            break
    assert found == [*[f"r/{name}" for name in names], "stderr", "stdout"]


async def test_outputs_are_read_in_pieces(place: Place) -> None:
    (place.layout.result("r") / "file").write_bytes(b"0123456789")
    assert await place.reader.read_output(piece("r/file", 2, 3)) == b"234"
    assert await place.reader.read_output(piece("r/file", 8, 30)) == b"89"
    assert await place.reader.read_output(piece("r/file", 10)) == b""
    assert await place.reader.read_output(piece("r/file", -5, 2)) == b"01"
    for path in ("../log.idx", "r/none", "/etc/passwd", ""):
        with pytest.raises(NotFoundError):
            await place.reader.read_output(piece(path))
