"""The content store: bounded, least recently used first, and right after any crash."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau.storages.content import CacheFullError, ContentStore
from bacalhau.storages.disk import check_tree_path
from bacalhau.storages.draft import Blob
from bacalhau_api.errors import TerminalError

KIB = 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ContentStore]:
    store = ContentStore(tmp_path / "cache", bytes_max=100 * KIB, boot="boot")
    yield store
    store.close()


def put(store: ContentStore, identity: str, data: bytes) -> Blob:
    draft = store.draft(identity)
    draft.begin("")
    draft.write(data)
    return draft.finish()


def on_disk(store: ContentStore) -> int:
    return sum(p.stat().st_size for p in (store.root / "blobs").rglob("*") if p.is_file())


def test_what_was_used_longest_ago_goes_first(store: ContentStore) -> None:
    for name in "abcd":
        put(store, name, name.encode() * 25 * KIB)
    assert store.find("a") is not None  # used just now
    put(store, "e", b"e" * 25 * KIB)
    assert {n for n in "abcde" if store.find(n)} == {"a", "c", "d", "e"}
    assert store.usage().used_bytes == on_disk(store) == 100 * KIB


def test_what_executions_hold_stays(store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    blob = put(store, "a", b"a" * 60 * KIB)
    place = store.place({"a": blob}, tmp_path / "in")
    with pytest.raises(CacheFullError, match="in use by executions"):
        put(store, "b", b"b" * 60 * KIB)
    assert (place / "a").read_bytes() == b"a" * 60 * KIB
    (place / "a").unlink()  # the execution's directory is removed
    put(store, "b", b"b" * 60 * KIB)
    assert store.find("a") is None


def test_held_contents_stay(store: ContentStore) -> None:
    blob = put(store, "a", b"a" * 60 * KIB)
    assert store.hold(blob.sha256)
    with pytest.raises(CacheFullError):
        put(store, "b", b"b" * 60 * KIB)
    store.release(blob.sha256)
    put(store, "b", b"b" * 60 * KIB)
    assert not store.hold(blob.sha256)


def test_what_can_never_fit_is_refused_for_good(store: ContentStore) -> None:
    draft = store.draft("a")
    with pytest.raises(TerminalError, match="--input-cache"):
        draft.begin("", total=101 * KIB)
    draft.begin("")
    for _ in range(10):
        draft.write(bytes(10 * KIB))
    with pytest.raises(TerminalError, match="--input-cache"):
        draft.write(bytes(10 * KIB))
    draft.discard()
    assert store.usage().used_bytes == 0
    assert list((store.root / "partial").iterdir()) == []


def test_forgotten_beginnings_go_before_whole_contents(store: ContentStore) -> None:
    put(store, "whole", b"w" * 50 * KIB)
    draft = store.draft("begun")
    draft.begin('"v"')
    draft.write(bytes(40 * KIB))
    draft.close()
    assert store.usage().used_bytes == 90 * KIB
    put(store, "next", b"n" * 50 * KIB)
    assert store.find("whole") is not None
    assert store.draft("begun").left('"v"') == 0


def test_equal_contents_are_kept_once(store: ContentStore) -> None:
    first, second = put(store, "a", b"same"), put(store, "b", b"same")
    assert first == second
    assert first.sha256 == hashlib.sha256(b"same").hexdigest()
    assert on_disk(store) == 4


def test_contents_are_read_only_and_readable_by_any_user(
    store: ContentStore, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    previous = os.umask(0o077)
    try:
        blob = put(store, "a", b"data")
        place = store.place({"sub/a": blob}, tmp_path / "in")
    finally:
        os.umask(previous)
    assert (place / "sub" / "a").stat().st_mode & 0o777 == 0o444
    assert place.stat().st_mode & 0o777 == 0o755
    assert (place / "sub").stat().st_mode & 0o777 == 0o755


def test_a_content_that_somebody_changed_is_not_given_out(store: ContentStore) -> None:
    blob = put(store, "a", b"data")
    blob.path.chmod(0o644)
    blob.path.write_bytes(b"evil")
    assert store.find("a") is None
    assert not blob.path.exists()
    put(store, "a", b"data")
    assert store.find("a") is not None


def test_it_survives_a_restart(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, bytes_max=KIB, boot="boot")
    blob = put(store, "a", b"data")
    store.close()
    stray = blob.path.with_name("0" * 64)
    stray.write_bytes(b"not in the index")
    again = ContentStore(tmp_path, bytes_max=KIB, boot="boot")
    found = again.find("a")
    assert found is not None
    assert found.blob == blob
    assert not stray.exists()
    blob.path.unlink()
    again.close()
    third = ContentStore(tmp_path, bytes_max=KIB, boot="boot")
    assert third.find("a") is None
    assert third.usage().used_bytes == 0
    third.close()


def test_after_a_power_failure_only_what_was_flushed_counts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    store = ContentStore(tmp_path / "cache", bytes_max=100 * KIB, boot="one")
    put(store, "torn", b"torn")
    placed = put(store, "placed", b"placed")
    store.place({"x": placed}, tmp_path / "in")
    draft = store.draft("begun")
    draft.begin('"v"')
    draft.write(bytes(KIB))
    draft.close()
    store.close()
    again = ContentStore(tmp_path / "cache", bytes_max=100 * KIB, boot="two")
    assert again.find("torn") is None
    assert again.find("placed") is not None
    assert again.draft("begun").left('"v"') == 0
    again.close()


def test_what_is_gone_on_with_counts_as_flushed_only_if_it_is(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = store.draft("begun")
    draft.begin('"v"')
    draft.write(bytes(KIB))
    draft.close()
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", lambda file: flushed.append(os.fstat(file).st_size))
    assert draft.begin('"v"') == KIB
    draft.close()
    noted = json.loads(next((store.root / "partial").glob("*.json")).read_text())["flushed"]
    assert flushed == [noted] == [KIB]


def test_an_index_that_is_torn_anywhere_is_begun_anew(tmp_path: Path) -> None:
    names = [f"source {number}" for number in range(100)]
    store = ContentStore(tmp_path, bytes_max=1 << 20, boot="boot")
    for name in names:
        put(store, name, name.encode())
    store.close()
    whole = (tmp_path / "index.db").read_bytes()
    size = int.from_bytes(whole[16:18], "big")
    for at in range(size, len(whole), size):
        torn = whole[:at] + bytes(size) + whole[at + size :]
        (tmp_path / "index.db").write_bytes(torn)
        again = ContentStore(tmp_path, bytes_max=1 << 20, boot="boot")
        for name in names:
            assert again.find(name) or put(again, name, name.encode())
        again.close()


def test_a_damaged_index_costs_contents_but_nothing_else(tmp_path: Path) -> None:
    store = ContentStore(tmp_path, bytes_max=KIB, boot="boot")
    put(store, "a", b"data")
    store.close()
    for name in ("index.db-wal", "index.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "index.db").write_bytes(b"no database at all" * 100)
    again = ContentStore(tmp_path, bytes_max=KIB, boot="boot")
    assert again.find("a") is None
    assert on_disk(again) == 0
    put(again, "a", b"data")
    again.close()


_WRITER = """
import sys
from pathlib import Path
from bacalhau.storages.content import ContentStore
store = ContentStore(Path(sys.argv[1]), bytes_max=1 << 20, boot="boot")
number = 0
while True:
    draft = store.draft(f"source {number % 40}")
    draft.begin('"v"')
    for part in range(4):
        draft.write(bytes([number % 251]) * 4096)
    draft.finish()
    number += 1
    print(number, flush=True)
"""


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    """Whatever the index speaks of afterwards is whole, and nothing else takes room."""
    for round_number in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(20 + 17 * round_number):
            assert writer.stdout.readline()
        writer.kill()
        writer.wait()
        writer.stdout.close()
        store = ContentStore(tmp_path, bytes_max=1 << 20, boot="boot")
        found = [known for n in range(40) if (known := store.find(f"source {n}"))]
        assert len(found) >= 19
        for known in found:
            assert hashlib.sha256(known.blob.path.read_bytes()).hexdigest() == known.blob.sha256
        partial = sum(
            p.stat().st_size for p in (tmp_path / "partial").iterdir() if p.suffix != ".json"
        )
        assert store.usage().used_bytes == on_disk(store) + partial
        store.close()


def test_many_files_at_once(store: ContentStore, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    files = {f"d{n % 30}/f{n}": put(store, str(n), str(n).encode()) for n in range(300)}
    place = store.place(files, tmp_path / "in")
    assert len([p for p in place.rglob("*") if p.is_file()]) == 300
    assert (place / "d7" / "f7").read_bytes() == b"7"


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "a\0b", "x" * 256, "a/" * 70 + "b", "\ud800"],
)
def test_names_that_are_no_paths(name: str) -> None:
    with pytest.raises(ValueError, match=r"path|text"):
        check_tree_path(name)
