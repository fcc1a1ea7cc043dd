"""Having the disk keep what was written."""

import contextlib
import os
from pathlib import Path

import pytest

from bacalhau import flush


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of the disk, in order."""
    asked: list[str] = []

    def fsync(file: int) -> None:
        asked.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(flush, "sync_file_system", lambda path: asked.append(f"all of {path.name}"))
    return asked


def test_a_small_tree_is_flushed_file_by_file(tmp_path: Path, flushed: list[str]) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").touch()
    (root / "link").symlink_to("/etc/hostname")
    os.mkfifo(root / "pipe")  # nobody would ever open its other end
    flush.flush_tree(root)
    assert flushed == ["file", "sub", "root"]


def test_files_that_go_meanwhile_are_passed_over(
    tmp_path: Path, flushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(flush, "_few", lambda root: [root, root / "file", root / "gone"])
    flush.flush_tree(tmp_path)
    assert flushed == ["file", tmp_path.name]


def test_a_tree_that_nobody_can_list_is_flushed_with_its_file_system(
    tmp_path: Path, flushed: list[str]
) -> None:
    name = "d" * 200
    with contextlib.chdir(tmp_path):
        for _ in range(30):  # by relative names: the whole path is longer than the kernel takes
            Path(name).mkdir()
            os.chdir(name)
    flush.flush_tree(tmp_path)
    assert flushed == [f"all of {tmp_path.name}"]


def test_a_large_or_closed_tree_is_flushed_with_its_file_system(
    tmp_path: Path, flushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(flush.SINGLY_MAX):
        (tmp_path / str(number)).touch()
    flush.flush_tree(tmp_path)
    assert flushed == [f"all of {tmp_path.name}"]

    def closed(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    flushed.clear()
    monkeypatch.setattr(os, "scandir", closed)
    flush.flush_tree(tmp_path)
    assert flushed == [f"all of {tmp_path.name}"]
