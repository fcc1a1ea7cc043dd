"""Directories of executions: what a workload may have left in them leads nowhere."""

import hashlib
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from bacalhau.node.files import Found, StoppedError, Trash, open_beneath, walk
from bacalhau.node.workspace import DiskWorkspace
from bacalhau.system import SystemClock
from bacalhau_api.errors import InvalidError, NotFoundError, TerminalError, TransientError
from bacalhau_controllers.runner.ports import Layout
from tests.support.flushes import record_fsyncs


@pytest.fixture
def workspace(tmp_path: Path) -> DiskWorkspace:
    return DiskWorkspace(tmp_path / "data", SystemClock())


@pytest.fixture
async def layout(workspace: DiskWorkspace) -> Layout:
    layout = workspace.layout("default", "job-1")
    await workspace.prepare(layout, 2)
    await workspace.begin_run(layout, 1, ["r"], reset=True)
    return layout


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/a", "a\0b", "-a", "a-", ".hidden", "a" * 256, "a\nb", "é"],
)
def test_names_that_are_no_names_are_refused(workspace: DiskWorkspace, name: str) -> None:
    with pytest.raises(InvalidError):
        workspace.layout("default", name)
    with pytest.raises(InvalidError):
        workspace.layout(name, "job-1")


async def test_directories_are_made_for_the_node_only(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    made = (
        layout.root,
        layout.root.parent,
        layout.root.parent.parent,
        layout.outputs,
        layout.input(0),
        layout.input(1),
        layout.run(1),
    )
    for path in (*made, layout.result("r")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


async def test_inputs_are_empty_each_time(workspace: DiskWorkspace, layout: Layout) -> None:
    (layout.input(0) / "half").write_text("fetched")
    await workspace.prepare(layout, 1)
    assert list(layout.input(0).iterdir()) == []
    assert not layout.input(1).exists()


async def test_a_result_name_leads_nowhere(workspace: DiskWorkspace, layout: Layout) -> None:
    for name in ("../../x", "/etc", "a/b", "stdout", "exitCode", ".."):
        with pytest.raises(InvalidError):
            await workspace.begin_run(layout, 2, [name], reset=False)


async def test_a_reset_run_sees_nothing_of_the_last(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    (layout.result("r") / "partial").write_text("x")
    layout.stdout.write_text("half a line")
    layout.log_index.write_bytes(b"i" * 24)
    await workspace.begin_run(layout, 2, ["r"], reset=True)
    assert list(layout.result("r").iterdir()) == []
    assert not layout.stdout.exists()
    assert not layout.log_index.exists()
    assert layout.run(2).is_dir()
    assert layout.input(0).is_dir()  # inputs stay


async def test_a_restarted_service_goes_on_where_it_was(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    (layout.result("r") / "state").write_text("x")
    layout.stdout.write_text("line\n")
    await workspace.begin_run(layout, 2, ["r"], reset=False)
    assert (layout.result("r") / "state").read_text() == "x"
    assert layout.stdout.read_text() == "line\n"


# -- collecting ------------------------------------------------------------------------------------


async def test_outputs_are_summed_up(workspace: DiskWorkspace, layout: Layout) -> None:
    layout.stdout.write_bytes(b"hello\n")
    layout.stderr.write_bytes(b"")
    deep = layout.result("r") / "a" / "b"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"data")
    (layout.result("r") / "a.txt").write_bytes(b"1")  # sorts before a/b by path
    got = await workspace.collect(layout, 3)
    contents = {
        "exitCode": b"3", "stdout": b"hello\n", "stderr": b"", "r/a/b/file": b"data",
        "r/a.txt": b"1",
    }  # fmt: skip
    lines = "".join(
        f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in sorted(contents.items())
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert got.outputs.digest == f"sha256:{expected}"
    assert got.outputs.files == 5
    assert got.outputs.size_bytes == sum(map(len, contents.values()))
    assert got.stdout_tail == "hello\n"
    assert (await workspace.collect(layout, 3)) == got  # asking twice is harmless


async def test_a_finished_result_is_on_the_disk_before_it_is_reported(
    workspace: DiskWorkspace, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = record_fsyncs(monkeypatch)
    layout.stdout.write_text("x")
    layout.stderr.write_text("")
    (layout.result("r") / "file").write_text("x")
    await workspace.collect(layout, 0)
    assert {path.name for path in flushed} == {"stdout", "exitCode", "file", "outputs"}


async def test_links_devices_and_fifos_are_passed_over(
    workspace: DiskWorkspace, layout: Layout, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("secret")
    result = layout.result("r")
    (result / "link").symlink_to(secret / "file")
    (result / "dir").symlink_to(secret)
    (result / "loop").symlink_to(".")
    os.mkfifo(result / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(result)  # the path of a socket may not be long
        listener.bind("socket")
        os.chdir(before)
    (result / "real").write_text("x")
    got = await workspace.collect(layout, 0)
    assert got.outputs.files == 2  # exitCode and real


async def test_too_many_or_too_large_or_too_deep_is_refused(tmp_path: Path) -> None:
    small = DiskWorkspace(tmp_path, SystemClock(), entries_max=10, bytes_max=100)
    layout = small.layout("default", "a")
    await small.begin_run(layout, 1, ["r"], reset=True)
    for number in range(12):
        (layout.result("r") / str(number)).write_text("")
    with pytest.raises(TerminalError, match="more than 10 files") as caught:
        await small.collect(layout, 0)
    assert caught.value.reason == "OutputLimit"
    await small.begin_run(layout, 1, ["r"], reset=True)
    (layout.result("r") / "big").write_bytes(bytes(200))
    with pytest.raises(TerminalError, match="larger than 100 bytes"):
        await small.collect(layout, 0)


async def test_bottomless_directories_are_refused_and_removed(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    dig(layout.result("r"), 3000)
    with pytest.raises(TerminalError, match="deeper") as caught:
        await workspace.collect(layout, 0)
    assert caught.value.reason == "OutputLimit"
    await workspace.remove(layout)
    assert not layout.root.exists()
    assert list((layout.root.parents[2] / "trash").iterdir()) == []


def dig(place: Path, depth: int) -> None:
    """Directories in directories, deeper than any path can name."""
    here = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


async def test_names_that_cannot_be_sent_are_refused(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    make_file(os.fsencode(layout.result("r")) + b"/\xff")
    with pytest.raises(TerminalError, match="UTF-8") as caught:
        await workspace.collect(layout, 0)
    assert caught.value.reason == "OutputUnreadable"


def make_file(path: bytes) -> None:
    with open(path, "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    ("data", "tail"),
    [
        pytest.param(b"", "", id="empty"),
        pytest.param(b"a" * 5000, "a" * 2048, id="the end"),
        pytest.param("é".encode() * 2000, "é" * 1024, id="whole characters"),
        pytest.param(b"x" + "é".encode() * 2000, "é" * 1024, id="whole characters, odd"),
        pytest.param("😀".encode() * 1000 + b"ab", "😀" * 511 + "ab", id="four bytes each"),
        pytest.param(b"\xff" * 3000, "�" * 682, id="no text at all"),
    ],
)
async def test_tails_are_short_and_valid(
    workspace: DiskWorkspace, layout: Layout, data: bytes, tail: str
) -> None:
    layout.stderr.write_bytes(data)
    got = (await workspace.collect(layout, None)).stderr_tail
    assert got == tail
    assert len(got.encode()) <= 2048
    assert not (layout.outputs / "exitCode").exists()


async def test_a_stream_that_is_no_file_is_no_stream(
    workspace: DiskWorkspace, layout: Layout, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    layout.stdout.symlink_to(tmp_path / "secret")
    os.mkfifo(layout.stderr)
    got = await workspace.collect(layout, 0)
    assert (got.stdout_tail, got.stderr_tail) == ("", "")


# -- removing --------------------------------------------------------------------------------------


async def test_removing_follows_no_link(
    workspace: DiskWorkspace, layout: Layout, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (layout.result("r") / "link").symlink_to(outside)
    locked = layout.result("r") / "locked"
    locked.mkdir()
    (locked / "file").write_text("x")
    locked.chmod(0o500)
    os.mkfifo(layout.result("r") / "fifo")
    await workspace.remove(layout)
    assert (outside / "kept").read_text() == "x"
    assert not layout.root.exists()
    assert not layout.root.parent.exists()  # its namespace was empty
    await workspace.remove(layout)  # again is harmless


async def test_dropping_outputs_keeps_the_rest_of_the_node(
    workspace: DiskWorkspace, layout: Layout
) -> None:
    other = workspace.layout("default", "job-2")
    await workspace.begin_run(other, 1, [], reset=False)
    await workspace.drop_outputs(layout)
    assert list(layout.root.iterdir()) == []
    assert other.outputs.is_dir()
    assert await workspace.strays() == (
        ("default", "job-1", 0.0),
        ("default", "job-2", 0.0),
    )


def test_what_a_crash_left_in_the_trash_is_removed(tmp_path: Path) -> None:
    trash = Trash(tmp_path / "trash")
    (tmp_path / "tree" / "a" / "b").mkdir(parents=True)
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        trash.remove(tmp_path / "tree", stop)
    assert not (tmp_path / "tree").exists()
    assert list((tmp_path / "trash").iterdir())
    Trash(tmp_path / "trash").empty()
    assert not list((tmp_path / "trash").iterdir())


async def test_a_full_disk_is_a_passing_trouble(
    workspace: DiskWorkspace, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(TransientError, match="No space left"):
        await workspace.prepare(workspace.layout("default", "b"), 1)


# -- paths that others ask for ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "..", ".", "../secret", "r/../../secret", "r/..", "/etc/passwd", "r//file",
        "r/./file", "r/file/", "r\0file", "r", "r/none", "r/link", "r/dir/file", "r/fifo",
        "r/" + "d/" * 5000 + "x", "a" * 300, "r/file/file",
    ],
)  # fmt: skip
async def test_no_path_leads_out_of_the_outputs(
    workspace: DiskWorkspace, layout: Layout, tmp_path: Path, path: str
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("secret")
    result = layout.result("r")
    (result / "file").write_text("fine")
    (result / "link").symlink_to(result / "file")
    (result / "dir").symlink_to(secret)
    os.mkfifo(result / "fifo")
    with pytest.raises(NotFoundError):
        os.close(open_beneath(layout.outputs, path))
    file = open_beneath(layout.outputs, "r/file")
    assert os.read(file, 10) == b"fine"
    os.close(file)


async def test_walking_leaves_nothing_open(workspace: DiskWorkspace, layout: Layout) -> None:
    for number in range(50):
        (layout.result("r") / str(number) / "x").mkdir(parents=True)
        (layout.result("r") / str(number) / "x" / "f").write_text("x")
    before = len(os.listdir("/proc/self/fd"))
    found: list[Found] = []
    for one in walk(layout.outputs, entries_max=1000):
        found.append(one)
        if len(found) == 20:
            break
    assert len({one.path for one in found}) == 20
    del one
    assert len(list(walk(layout.outputs, entries_max=1000))) == 50
    assert len(os.listdir("/proc/self/fd")) == before
