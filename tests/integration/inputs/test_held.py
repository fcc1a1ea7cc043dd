"""What a node tells of the inputs that it holds: by share, after eviction and after a restart."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bacalhau.storages import held
from bacalhau.storages.content import ContentStore
from bacalhau.storages.draft import Blob
from bacalhau.storages.pins import MemoryPins
from bacalhau.storages.s3 import S3Storage
from bacalhau.transfer.s3 import S3Access
from bacalhau_api.locality import input_key
from bacalhau_api.v1.node import HELD_INPUTS_MAX
from bacalhau_controllers.runner.ports import Use
from tests.support.inputs import MIB, input_cache, item
from tests.support.s3 import ADMIN, S3Server


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ContentStore]:
    store = ContentStore(tmp_path / "cache", bytes_max=8 * MIB, boot="boot")
    yield store
    store.close()


def put(store: ContentStore, identity: str, size: int) -> Blob:
    draft = store.draft(identity)
    draft.begin("")
    draft.write(identity.encode().ljust(64) * (size // 64))
    return draft.finish()


def told(store: ContentStore) -> dict[str, tuple[int, int]]:
    return {one.key: (one.size_bytes, one.total_bytes) for one in store.held_inputs()}


async def test_each_share_is_told_by_its_own_key(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
    for number in range(6):
        s3.put(f"share/{number}", os.urandom(MIB))
    whole = item("s3", bucket="data", key="share/", endpoint=s3.url)
    shared = item("s3", **whole.source.params, partition={"type": "object"})
    for name in ("in0", "in1", "all"):
        (tmp_path / name).mkdir()
    async with input_cache(tmp_path / "cache") as cache:
        storage = S3Storage(cache, S3Access([s3.url]), MemoryPins(), size_bytes_max=48 * MIB)
        sizes = {}
        for partition in (0, 1):
            use = Use(job_uid="u", generation=1, partition=partition, partitions=2)
            fetched = await storage.fetch(shared, tmp_path / f"in{partition}", use)
            sizes[input_key(shared.source, partition, 2)] = fetched.size_bytes
        found = {one.key: one.size_bytes for one in await cache.held_inputs()}
        assert found == sizes
        assert sum(sizes.values()) == 6 * MIB
        await storage.fetch(whole, tmp_path / "all", Use())
        found = {one.key: one.size_bytes for one in await cache.held_inputs()}
        assert found == {**sizes, input_key(whole.source): 6 * MIB}


def test_what_was_evicted_counts_no_more(store: ContentStore) -> None:
    blobs = [put(store, f"x{number}", 2 * MIB) for number in range(3)]
    store.note_input("a" * 16, blobs)
    store.note_input("b" * 16, blobs[:1] * 2)
    assert told(store) == {"a" * 16: (6 * MIB, 6 * MIB), "b" * 16: (2 * MIB, 2 * MIB)}
    put(store, "y", 4 * MIB)  # takes the place of the oldest one
    assert told(store) == {"a" * 16: (4 * MIB, 6 * MIB)}
    put(store, "z", 8 * MIB)
    assert told(store) == {}


def test_a_restart_forgets_nothing(store: ContentStore) -> None:
    store.note_input("a" * 16, [put(store, "x", 2 * MIB)])
    again = ContentStore(store.root, bytes_max=8 * MIB, boot="boot")
    assert told(again) == {"a" * 16: (2 * MIB, 2 * MIB)}
    again.close()


def test_little_and_too_many_are_left_out(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.note_input("small", [put(store, "s", MIB // 2)])
    assert told(store) == {}
    blob = put(store, "x", MIB)
    for number in range(HELD_INPUTS_MAX + 5):
        store.note_input(f"{number:016x}", [blob])
    assert len(told(store)) == HELD_INPUTS_MAX
    monkeypatch.setattr(held, "INPUTS_MAX", 3)
    store.note_input("newest", [blob])
    assert set(told(store)) == {
        "newest",
        f"{HELD_INPUTS_MAX + 4:016x}",
        f"{HELD_INPUTS_MAX + 3:016x}",
    }


def test_of_very_many_contents_the_largest_are_counted(
    store: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "CONTENTS_MAX", 2)
    blobs = [put(store, f"x{number}", (1 + number) * MIB // 2) for number in range(4)]
    store.note_input("a" * 16, blobs)
    assert told(store) == {"a" * 16: (7 * MIB // 2, 5 * MIB)}
