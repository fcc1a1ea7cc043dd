"""Outputs: lists, files, archives, and whole downloads."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import httpx
import pytest

from bacalhau.client import download as download_module
from bacalhau.client.calls import outputs as page_call
from bacalhau.client.download import Progress, digest_of, download
from bacalhau.client.layout import Layout, check_parts, place
from bacalhau.client.sync import Client
from bacalhau.server import outputs
from bacalhau_api.errors import (
    BacalhauError,
    InvalidError,
    NotFoundError,
    TerminalError,
    UnavailableError,
)
from bacalhau_api.v1.execution import Execution, OutputFile, Outputs, Phase
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_api.wire import OutputsPage
from tests.support.api_objects import make_acceptance, make_execution, make_node, stored_job
from tests.support.api_server import RunningServer

EXECUTIONS = "/apis/bacalhau.org/v1/namespaces/default/executions"


def arranged(server: RunningServer, files: list[dict[str, str]]) -> tuple[Job, list[Execution]]:
    """A completed job whose slots left these files, with right digests."""
    job = stored_job(count=len(files), phase=JobPhase.COMPLETED)
    executions = []
    for i, tree in enumerate(files):
        name = make_execution(job, i).name
        paths = [(path, server.nodes.write("n1", name, path, text)) for path, text in tree.items()]
        outputs = Outputs(files=len(tree), digest=digest_of(paths))
        executions.append(
            make_execution(job, i, phase=Phase.SUCCEEDED, exit_code=0, outputs=outputs)
        )
    server.put(job, *executions, *[make_acceptance(e, job) for e in executions], make_node())
    return job, executions


def tree_of(root: Path) -> dict[str, str]:
    """All files below a directory."""
    return {
        str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()
    }


def test_list_goes_over_pages(client: Client, server: RunningServer) -> None:
    names = [f"res/{i:02}.txt" for i in range(10)]
    _, (execution,) = arranged(server, [dict.fromkeys(names, "x")])
    assert [f.path for f in client.outputs(execution.name)] == names


@pytest.mark.parametrize("paths", [("a",), ("b", "a"), ("",)])
def test_a_list_without_an_end_is_refused(
    http: httpx.Client,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    paths: tuple[str, ...],
) -> None:
    _, (execution,) = arranged(server, [{"f": "x"}])
    page = OutputsPage(
        files=tuple(OutputFile(path=path, size_bytes=1) for path in paths), is_last=False
    )

    async def same(node: str, namespace: str, name: str, after: str) -> OutputsPage:
        return page

    monkeypatch.setattr(server.nodes, "list_outputs", same)
    for path in ("file?path=zz", "file?path=a0"):
        answer = http.get(f"{EXECUTIONS}/{execution.name}/outputs/{path}", timeout=5)
        assert answer.status_code == 503
        assert "lists its outputs out of order" in answer.json()["message"]
    with pytest.raises(BacalhauError, match="out of order"):
        # Whoever answers, such as a node itself.
        page_call(execution.name, "default", "c").parse(page.encode())


def test_file_by_offset_and_range(http: httpx.Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server, [{"a": "x", "res/f.txt": "0123456789"}])
    path = f"{EXECUTIONS}/{execution.name}/outputs/file?path=res/f.txt"
    whole = http.get(path)
    assert (whole.status_code, whole.text) == (200, "0123456789")
    assert whole.headers["content-disposition"] == 'attachment; filename="f.txt"'
    assert whole.headers["content-type"] == "application/octet-stream"
    part = http.get(path, headers={"range": "bytes=3-5"})
    assert (part.status_code, part.text) == (206, "345")
    assert part.headers["content-range"] == "bytes 3-5/10"
    assert http.get(f"{path}&offset=8").text == "89"
    assert http.get(f"{path}&offset=10").text == ""
    assert http.get(path, headers={"range": "bytes=-2"}).text == "89"
    assert http.get(path, headers={"range": "bytes=7-"}).text == "789"
    beyond = http.get(path, headers={"range": "bytes=10-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */10")
    for odd in ("bytes=a-b", "bytes=5-2", "lines=1-2", "bytes=1-2,4-5"):
        assert http.get(path, headers={"range": odd}).status_code in (200, 206), odd


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../b", "a//b", "./a", "", "a\0b", "x" * 5000]
)
def test_paths_that_lead_elsewhere_are_refused(
    http: httpx.Client, server: RunningServer, path: str
) -> None:
    _, (execution,) = arranged(server, [{"a": "x"}])
    reads = server.nodes.reads
    answer = http.get(f"{EXECUTIONS}/{execution.name}/outputs/file", params={"path": path})
    assert answer.status_code == 400
    assert answer.json()["field"] == "path"
    assert server.nodes.reads == reads


def test_hostile_names_are_only_names(http: httpx.Client, server: RunningServer) -> None:
    name = 'res/x";\n<script>.html'
    _, (execution,) = arranged(server, [{name: "<script>"}])
    answer = http.get(f"{EXECUTIONS}/{execution.name}/outputs/file", params={"path": name})
    assert answer.headers["content-disposition"] == 'attachment; filename="x____script_.html"'
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_archive_is_a_tar_of_all_files(http: httpx.Client, server: RunningServer) -> None:
    tree = {"stdout": "hi\n", "res/deep/f": "0123" * 1000, "res/empty": ""}
    _, (execution,) = arranged(server, [tree])
    answer = http.get(f"{EXECUTIONS}/{execution.name}/outputs/archive")
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        found = {m.name: archive.extractfile(m).read().decode() for m in archive}  # type: ignore[union-attr]
    assert found == tree


def test_archive_that_breaks_off_is_no_whole_answer(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (execution,) = arranged(server, [{"a": "x" * 10}])

    async def nothing(*_: object) -> bytes:
        return b""

    monkeypatch.setattr(server.nodes, "read_output", nothing)
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(f"{EXECUTIONS}/{execution.name}/outputs/archive")


def test_node_away(http: httpx.Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server, [{"a": "x"}])
    server.nodes.away.add("n1")
    for sub in ("outputs", "outputs/archive", "outputs/file?path=a"):
        answer = http.get(f"{EXECUTIONS}/{execution.name}/{sub}")
        assert (answer.status_code, answer.json()["reason"]) == (503, "Unavailable"), sub
        assert answer.headers["retry-after"]


def test_download_of_one_slot_is_flat(
    client: Client, server: RunningServer, tmp_path: Path
) -> None:
    tree = {"stdout": "hi\n", "stderr": "", "exitCode": "0", "res/a/b.txt": "data"}
    arranged(server, [tree])
    done = client.download("a", tmp_path / "out")
    assert tree_of(done.path) == tree
    assert os.listdir(tmp_path) == ["nodes", "out"] or set(os.listdir(tmp_path)) == {"nodes", "out"}


def test_download_merges_slots(client: Client, server: RunningServer, tmp_path: Path) -> None:
    arranged(
        server,
        [
            {"stdout": "zero\n", "exitCode": "0", "res/0.csv": "a"},
            {"stdout": "one\n", "exitCode": "0", "res/1.csv": "b"},
        ],
    )
    client.download("a", tmp_path / "out")
    assert tree_of(tmp_path / "out") == {
        "stdout": "zero\none\n",
        "exitCode": "0\n0\n",
        "res/0.csv": "a",
        "res/1.csv": "b",
        "partitions/0/stdout": "zero\n",
        "partitions/0/exitCode": "0",
        "partitions/1/stdout": "one\n",
        "partitions/1/exitCode": "0",
    }


def test_slots_that_clash_are_kept_apart(
    client: Client, server: RunningServer, tmp_path: Path
) -> None:
    arranged(server, [{"res/x.csv": "a", "res/y.csv": "c"}, {"res/x.csv": "b"}])
    done = client.download("a", tmp_path / "out")
    assert tree_of(done.path) == {
        "partitions/0/res/x.csv": "a",
        "partitions/0/res/y.csv": "c",
        "partitions/1/res/x.csv": "b",
    }
    assert "both have 'res/x.csv'" in done.notes[0]
    with pytest.raises(InvalidError, match="cannot be merged"):
        client.download("a", tmp_path / "other", layout="merged")
    assert not (tmp_path / "other").exists()


def test_download_goes_on_where_it_was(
    client: Client, server: RunningServer, tmp_path: Path
) -> None:
    arranged(server, [{"a": "0" * 1_000_000, "b": "1" * 1_000_000}])
    server.nodes.reads = 0

    class Interrupted(Exception):
        pass

    def interrupt(progress: Progress) -> None:
        if progress.done_bytes > 1_200_000:
            raise Interrupted

    items = client.results("a").items
    with pytest.raises(Interrupted):
        download(client, items, "default", tmp_path / "out", on_progress=interrupt)
    assert not (tmp_path / "out").exists()
    last: list[Progress] = []
    done = download(client, items, "default", tmp_path / "out", on_progress=last.append)
    assert last[-1].resumed_bytes > 0
    assert last[-1].done_bytes == last[-1].total_bytes == 2_000_000
    assert tree_of(done.path) == {"a": "0" * 1_000_000, "b": "1" * 1_000_000}
    assert set(os.listdir(tmp_path)) == {"nodes", "out"}


def test_a_pull_that_breaks_often_goes_on_where_it_was(
    client: Client, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more often than it may fail in vain: each time something came."""
    arranged(server, [{"a": "0123456789abcdef" * 40_000}])
    real, asked = server.nodes.read_output, []

    async def flaky(node: str, ns: str, name: str, path: str, offset: int, size: int) -> bytes:
        asked.append(offset)
        if offset and not calls[offset]:
            calls[offset] += 1
            raise UnavailableError("the line broke")
        return await real(node, ns, name, path, offset, size)

    calls: Counter[int] = Counter()
    monkeypatch.setattr(server.nodes, "read_output", flaky)
    monkeypatch.setattr(outputs, "PIECE_TRIES_MAX", 1)  # so that each break reaches the client
    monkeypatch.setattr(outputs, "PIECE_BYTES", outputs.PIECE_BYTES_FIRST)
    items = client.results("a").items
    monkeypatch.setattr(download_module, "_PAUSE_SECONDS", 0.01)
    last: list[Progress] = []
    done = download(client, items, "default", tmp_path / "out", on_progress=last.append)
    assert tree_of(done.path) == {"a": "0123456789abcdef" * 40_000}
    assert sum(calls.values()) >= 8, "it broke at each piece"
    assert asked == sorted(asked), "and never began anew"
    assert last[-1].done_bytes == last[-1].total_bytes


def test_pieces_fit_the_line(
    client: Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a slow line small ones are asked for; what was not answered is asked for in less."""
    _, (execution,) = arranged(server, [{"a": "x" * 300_000}])
    real = server.nodes.read_output
    sizes: list[int] = []
    limit = 20_000

    async def slow(node: str, ns: str, name: str, path: str, offset: int, size: int) -> bytes:
        sizes.append(size)
        if size > limit:
            raise UnavailableError("no answer in time")
        return await real(node, ns, name, path, offset, min(size, limit))

    monkeypatch.setattr(server.nodes, "read_output", slow)
    with client.open_output(execution.name, "a") as pieces:
        assert sum(len(piece) for piece in pieces) == 300_000
    assert sizes[0] == outputs.PIECE_BYTES_FIRST
    assert sizes[1] == outputs.PIECE_BYTES_MIN
    assert max(sizes[2:]) <= 2 * limit


@pytest.mark.parametrize(
    ("size", "took", "then"),
    [
        (64 * 1024, 0.01, 128 * 1024),
        (256 * 1024, 0.01, 256 * 1024),
        (64 * 1024, 0.7, 64 * 1024),
        (64 * 1024, 3.0, 32 * 1024),
        (8 * 1024, 9.0, 8 * 1024),
    ],
)
def test_next_size(size: int, took: float, then: int) -> None:
    assert outputs._next_size(size, took) == then


def test_damage_is_noticed(client: Client, server: RunningServer, tmp_path: Path) -> None:
    _, (execution,) = arranged(server, [{"a": "right"}])
    (server.nodes.directory("n1", "default", execution.name) / "outputs/a").write_text("wrong")
    with pytest.raises(TerminalError, match="not those that its node recorded") as error:
        client.download("a", tmp_path / "out")
    assert error.value.reason == "DigestMismatch"
    assert not (tmp_path / "out").exists()


def test_a_target_in_use_is_refused_before_anything_is_read(
    client: Client, server: RunningServer, tmp_path: Path
) -> None:
    arranged(server, [{"a": "x"}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("keep")
    with pytest.raises(InvalidError, match="not an empty directory"):
        client.download("a", tmp_path / "out")
    assert tree_of(tmp_path / "out") == {"mine": "keep"}
    (tmp_path / "empty").mkdir()
    client.download("a", tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(InvalidError):
        client.download("a", tmp_path / "link")


def test_download_without_results_or_nodes(
    client: Client, server: RunningServer, tmp_path: Path
) -> None:
    server.put(stored_job("none"))
    with pytest.raises(NotFoundError):
        client.download("none", tmp_path / "out")
    arranged(server, [{"a": "x"}])
    server.nodes.away.add("n1")
    with pytest.raises(UnavailableError):
        client.download("a", tmp_path / "out")


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../b", "a//b", "", ".", "a\0", "x" * 300, "\ud800"]
)
def test_unsafe_paths_of_a_server_are_refused(path: str) -> None:
    with pytest.raises(TerminalError):
        check_parts(path)
    with pytest.raises(TerminalError):
        place([("0", [path])], "auto")


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        pytest.param("r/a", "r/b", False, id="different files merge"),
        pytest.param("r/a", "r/a", True, id="the same file"),
        pytest.param("r/a", "r/A", True, id="the same file to some file systems"),
        pytest.param("r/a", "r/a/b", True, id="a file where the other has a folder"),
        pytest.param("r/a/b", "r/a", True, id="a folder where the other has a file"),
        pytest.param("partitions/0/x", "r/b", True, id="a result of the reserved name"),
        pytest.param("stdout/x", "r/b", True, id="a result named like a stream"),
    ],
)
def test_clashes(first: str, second: str, clash: bool) -> None:
    slots = [("0", ["stdout", first]), ("1", ["stdout", second])]
    layout: Layout = "merged"
    if clash:
        with pytest.raises(InvalidError):
            place(slots, layout)
    placed = place(slots, "auto")
    targets = [*placed.files, *placed.joined]
    assert len(targets) == len(set(targets)) == 5
    assert ("partitions/1/" + second in placed.files) == clash
