"""Reading a directory at one moment: real files, real git."""

import asyncio
import os
from pathlib import Path

import pytest

from bacalhau.gitops import files as files_module
from bacalhau.gitops.files import AbsentError, scan
from bacalhau.gitops.ignore import Selection
from bacalhau.gitops.parse import FILE_BYTES_MAX
from bacalhau.gitops.tree import DirectoryTree
from bacalhau.system import SystemClock
from bacalhau_api.v1.source import SourceSpec
from bacalhau_controllers.gitops import TreeView
from tests.support.gitops import manifest
from tests.support.repo import Repo

QUICK = SourceSpec(settle_seconds=0.1)


def names(view: TreeView) -> list[str]:
    return [item.resource.name for item in view.declared]


def tree_of(root: Path) -> DirectoryTree:
    return DirectoryTree(root, SystemClock())


async def test_files_below_a_directory(tmp_path: Path) -> None:
    for path in ("a.yaml", "sub/b.yml", "sub/deep/c.JSON", "note.txt", ".hidden/h.yaml", ".x.yaml"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(manifest(file.stem.strip(".")))
    (tmp_path / "sub/deep/c.JSON").write_text(
        '{"apiVersion": "bacalhau.org/v1", "kind": "Job", "metadata": {"name": "c"}, "spec": '
        '{"type": "batch", "tasks": [{"engine": {"type": "noop"}}]}}'
    )
    view = await tree_of(tmp_path).read(QUICK)
    assert names(view) == ["a", "b", "c"]
    assert [i.file for i in view.declared] == ["a.yaml", "sub/b.yml", "sub/deep/c.JSON"]
    assert (view.files, view.problems, view.commit) == (3, (), "")
    assert len(view.revision) == 40


async def test_the_same_content_is_the_same_objects(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(manifest("a"))
    (tmp_path / "b.yaml").write_text(manifest("b"))
    tree = tree_of(tmp_path)
    first = await tree.read(QUICK)
    assert await tree.read(QUICK) is first
    os.utime(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(manifest("b", "two"))
    second = await tree.read(QUICK)
    assert second.declared[0].resource is first.declared[0].resource
    assert second.declared[1].resource is not first.declared[1].resource
    assert second.revision != first.revision


async def test_a_half_written_directory_is_never_seen(tmp_path: Path) -> None:
    """A writer that goes on for several settle times: what is read is before or after, whole."""
    before = {f"{i}.yaml": manifest(f"j{i}", "one") for i in range(8)}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    tree = tree_of(tmp_path)
    spec = SourceSpec(settle_seconds=0.3)
    await tree.read(spec)

    async def rewrite() -> None:
        for i in range(8):
            (tmp_path / f"{i}.yaml").write_text("")  # as an editor that truncates first
            await asyncio.sleep(0.05)
            (tmp_path / f"{i}.yaml").write_text(manifest(f"j{i}", "two"))
            await asyncio.sleep(0.05)

    writing = asyncio.create_task(rewrite())
    await asyncio.sleep(0.02)
    view = await tree.read(spec)
    await writing
    assert view.problems == ()
    images = {i.resource.spec.task.engine.params["image"] for i in view.declared}  # type: ignore[attr-defined]
    assert (len(view.declared), images) == (8, {"two"})


async def test_a_directory_that_does_not_rest_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bacalhau.gitops.tree.REST_SECONDS_MAX", 0.3)
    stop = asyncio.Event()

    async def restless() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            (tmp_path / "a.yaml").write_text(manifest("a", f"i{count}"))
            await asyncio.sleep(0.01)

    writing = asyncio.create_task(restless())
    view = await tree_of(tmp_path).read(SourceSpec(settle_seconds=0.2))
    stop.set()
    await writing
    assert view.absent_reason == "Unsettled"


@pytest.mark.parametrize("name", ["index.lock", "rebase-merge", "rebase-apply"])
async def test_git_at_work_is_waited_for(tmp_path: Path, name: str) -> None:
    repo = Repo(tmp_path)
    repo.write(a=manifest("a"))
    lock = tmp_path / ".git" / name
    lock.touch()
    tree = tree_of(tmp_path)
    reading = asyncio.create_task(tree.read(SourceSpec(view="files", settle_seconds=0.1)))
    await asyncio.sleep(0.5)
    assert not reading.done()
    lock.unlink()
    assert names(await reading) == ["a"]


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
async def test_what_is_no_directory(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "fleet"
    if kind == "file":
        root.write_text("x")
    if kind == "empty":
        root.mkdir()
    view = await tree_of(root).read(QUICK)
    assert view.declared == ()
    assert bool(view.absent) is (kind != "empty")


async def test_problems_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "comment.yaml").write_text("# later\n---\n")
    (tmp_path / "two.yaml").write_text(
        manifest("a") + "---\n" + manifest("b").replace("batch", "x")
    )
    (tmp_path / "large.yaml").write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    view = await tree_of(tmp_path).read(QUICK)
    found = {(p.file, p.line, p.reason) for p in view.problems}
    assert found == {
        ("empty.yaml", 0, "Empty"), ("two.yaml", 16, "Invalid"), ("large.yaml", 0, "TooLarge"),
    }  # fmt: skip
    assert view.declared == ()


async def test_links_do_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.yaml").write_text(manifest("x"))
    root = tmp_path / "fleet"
    (root / "..data").mkdir(parents=True)
    (root / "..data/a.yaml").write_text(manifest("a"))
    (root / "a.yaml").symlink_to("..data/a.yaml")  # as a mounted ConfigMap has it
    (root / "x.yaml").symlink_to(outside / "x.yaml")
    (root / "all").symlink_to(outside)
    (root / "loop").symlink_to(root)
    view = await tree_of(root).read(QUICK)
    assert names(view) == ["a"]
    assert {(p.file, p.reason) for p in view.problems} == {("x.yaml", "Link"), ("all", "Link")}
    (root / ".bacalhauignore").write_text("x.yaml\nall\n")
    assert (await tree_of(root).read(QUICK)).problems == ()


async def test_ignore_patterns(tmp_path: Path) -> None:
    for path in ("a.yaml", "draft/b.yaml", "draft/keep.yaml", "charts/c.yaml"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(manifest(Path(path).stem))
    (tmp_path / ".bacalhauignore").write_text("draft/*\n!draft/keep.yaml\n")
    tree = tree_of(tmp_path)
    assert names(await tree.read(QUICK)) == ["a", "c", "keep"]
    assert names(await tree.read(QUICK.but(ignore=("charts/",)))) == ["a", "keep"]


async def test_the_namespace_of_manifests_that_name_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(manifest("a"))
    (tmp_path / "b.yaml").write_text(manifest("b", namespace="other"))
    tree = tree_of(tmp_path)
    await tree.read(QUICK)
    view = await tree.read(QUICK.but(namespace="team"))
    assert [i.resource.ref.namespace for i in view.declared] == ["team", "other"]


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        (tmp_path / f"{i}.yaml").touch()
    monkeypatch.setattr(files_module, "FILES_MAX", 2)
    with pytest.raises(AbsentError, match="more than 2 manifests"):
        scan(tmp_path, Selection())


# -- git -------------------------------------------------------------------------------------------


async def test_a_clone_is_read_at_head(tmp_path: Path) -> None:
    repo = Repo(tmp_path)
    repo.write(a=manifest("a"), sub__b=manifest("b"))
    commit = repo.commit()
    (tmp_path / "a.yaml").write_text("half of an ed")
    (tmp_path / "new.yaml").write_text(manifest("new"))
    tree = tree_of(tmp_path)
    view = await tree.read(QUICK)
    assert (names(view), view.commit, view.revision) == (["a", "b"], commit, commit)
    assert await tree.read(QUICK) is view
    second = repo.commit()  # with the broken file in it
    view = await tree.read(QUICK)
    assert (names(view), view.commit) == (["new", "b"], second)
    assert [p.file for p in view.problems] == ["a.yaml"]


async def test_a_directory_within_a_clone(tmp_path: Path) -> None:
    repo = Repo(tmp_path)
    repo.write(top=manifest("top"), fleet__prod__a=manifest("a"), fleet__test__b=manifest("b"))
    repo.commit()
    view = await tree_of(tmp_path / "fleet" / "prod").read(QUICK)
    assert [(i.file, i.resource.name) for i in view.declared] == [("a.yaml", "a")]


async def test_a_bare_repository_a_work_tree_and_branches(tmp_path: Path) -> None:
    origin = Repo(tmp_path / "fleet.git", bare=True)
    work = Repo(tmp_path / "work")
    work.git("remote", "add", "origin", str(origin.root))
    work.write(a=manifest("a"))
    first = work.commit()
    work.git("push", "-q", "origin", "main")
    tree = tree_of(origin.root)
    assert (await tree.read(QUICK)).commit == first
    work.git("checkout", "-q", "-b", "team/next")
    work.write(b=manifest("b"))
    second = work.commit()
    beside = tmp_path / "beside"
    work.git("worktree", "add", "-q", "--detach", str(beside), second)
    assert names(await tree_of(beside).read(QUICK)) == ["a", "b"]
    mine = tree_of(work.root)
    assert (await mine.read(QUICK)).commit == second
    work.git("checkout", "-q", "main")
    assert (await mine.read(QUICK)).commit == first


async def test_repositories_that_cannot_be_read(tmp_path: Path) -> None:
    repo = Repo(tmp_path / "new")
    assert "no commit" in (await tree_of(repo.root).read(QUICK)).absent
    plain = tmp_path / "plain"
    plain.mkdir()
    view = await tree_of(plain).read(QUICK.but(view="git"))
    assert "not a git clone" in view.absent
    repo.write(a=manifest("a"))
    repo.commit()
    for path in (repo.root / ".git" / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(b"")
    view = await tree_of(repo.root).read(QUICK)
    assert view.absent
    assert view.declared == ()


async def test_a_commit_without_the_directory_is_an_emptied_one(tmp_path: Path) -> None:
    repo = Repo(tmp_path)
    repo.write(fleet__a=manifest("a"), other=manifest("o"))
    repo.commit()
    tree = tree_of(tmp_path / "fleet")
    assert names(await tree.read(QUICK)) == ["a"]
    repo.git("rm", "-q", "--cached", "-r", "fleet")
    repo.git("commit", "-q", "-m", "gone")
    view = await tree.read(QUICK)
    assert (view.declared, view.absent, view.problems) == ((), "", ())


async def test_links_in_a_commit(tmp_path: Path) -> None:
    repo = Repo(tmp_path)
    repo.write(real__a=manifest("a"))
    (tmp_path / "b.yaml").symlink_to("real/a.yaml")
    (tmp_path / "out.yaml").symlink_to("../secret.yaml")
    (tmp_path / "abs.yaml").symlink_to("/etc/passwd")
    repo.put(".bacalhauignore", "real/\n")
    repo.commit()
    view = await tree_of(tmp_path).read(QUICK)
    assert [(i.file, i.resource.name) for i in view.declared] == [("b.yaml", "a")]
    assert {p.file for p in view.problems} == {"out.yaml", "abs.yaml"}


async def test_git_runs_nothing_of_the_repository(tmp_path: Path) -> None:
    """Neither hooks nor the commands that a repository's own settings may name."""
    repo = Repo(tmp_path / "repo")
    repo.write(a=manifest("a"))
    repo.commit()
    trap = tmp_path / "trap"
    script = tmp_path / "run.sh"
    script.write_text(f"#!/bin/sh\ntouch {trap}\n")
    script.chmod(0o755)
    repo.git("config", "core.fsmonitor", str(script))
    repo.git("config", "core.pager", str(script))
    repo.git("config", "core.sshCommand", str(script))
    view = await tree_of(repo.root).read(QUICK)
    assert names(view) == ["a"]
    assert not trap.exists()


async def test_the_environment_of_a_hook_points_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, other = Repo(tmp_path / "one"), Repo(tmp_path / "two")
    repo.write(a=manifest("a"))
    repo.commit()
    other.write(b=manifest("b"))
    other.commit()
    monkeypatch.setenv("GIT_DIR", str(other.root / ".git"))
    assert names(await tree_of(repo.root).read(QUICK)) == ["a"]


# -- waking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "git", "bare"])
async def test_changes_wake(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "fleet"
    work = Repo(tmp_path / "work")
    work.write(a=manifest("a"))
    work.commit()
    if kind == "files":
        root.mkdir()
    else:
        mode = ["--bare"] if kind == "bare" else []
        work.git("clone", "-q", *mode, str(work.root), str(root))
    tree = tree_of(root)
    await tree.read(QUICK)
    woken = asyncio.Event()
    async with tree.watching(woken.set):
        await asyncio.sleep(0.7)  # until the kernel watches: nothing tells when
        woken.clear()
        work.write(b=manifest("b"))
        work.commit()
        if kind == "files":
            (root / "b.yaml").write_text(manifest("b"))
        elif kind == "git":
            work.git("-C", str(root), "pull", "-q")
        else:
            work.git("push", "-q", str(root), "main")
        async with asyncio.timeout(20):
            await woken.wait()


async def test_a_directory_that_comes_later_is_watched(tmp_path: Path) -> None:
    root = tmp_path / "later"
    tree = tree_of(root)
    assert (await tree.read(QUICK)).absent
    woken = asyncio.Event()
    async with tree.watching(woken.set):
        root.mkdir()
        async with asyncio.timeout(20):
            await woken.wait()
            woken.clear()
            while not woken.is_set():
                (root / "a.yaml").write_text(manifest("a"))
                await asyncio.sleep(0.2)
