"""kill -9 of the server under load: what was acknowledged is there, commits are whole, and each
object's history folds to its state."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bacalhau.nats.server import EmbeddedNats
from bacalhau.store.jetstream import JetStreamStore
from bacalhau_api.errors import ConflictError, OutcomeUnknownError, UnavailableError
from bacalhau_api.meta import Ref
from bacalhau_controllers.store import Delete, Put, Write
from tests.support.nats import crash, eventually, open_store, running_server
from tests.support.stores import WHY, node

KILLS = 4


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedNats]:
    # Killed often on purpose here: do not wait longer each time.
    monkeypatch.setattr("bacalhau.nats.server._RESTART_PAUSE_MAX", 0.1)
    async with running_server(tmp_path) as running:
        yield running


class Load:
    """Groups of objects, each written in one commit; remembers what was acknowledged."""

    def __init__(self, store: JetStreamStore, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.acked: dict[Ref, int] = {}  # 0 for removed
        self.groups: dict[str, int] = {}
        self.commits = 0
        self.is_over = False

    async def write(self, group: str, size: int) -> None:
        """Change one group for ever, from what is known of it; read it again where that is not
        sure."""
        refs = [Ref("Node", "", f"{group}-{i}") for i in range(size)]
        self.groups[group] = size
        at = [0] * size
        number = 0
        while not self.is_over:
            number += 1
            removing = self.rng.random() < 0.1 and all(at)
            writes: list[Write] = [
                Delete(ref, revision)
                if removing
                else Put(node(ref.name).with_meta(annotations={"number": str(number)}), revision)
                for ref, revision in zip(refs, at, strict=True)
            ]
            try:
                stored = await self.store.commit(writes, WHY)
            except (ConflictError, OutcomeUnknownError, UnavailableError):
                at = [await self._revision(ref) for ref in refs]
                continue
            self.commits += 1
            at = [item.metadata.resource_version if item else 0 for item in stored]
            self.acked.update(zip(refs, at, strict=True))

    async def progress(self) -> None:
        """Return a moment after some more commits were acknowledged."""
        wanted = self.commits + 10
        await eventually(lambda: self.commits >= wanted, "progress")
        await asyncio.sleep(self.rng.uniform(0, 0.05))

    async def _revision(self, ref: Ref) -> int:
        while True:
            try:
                found = await self.store.get(ref)
            except UnavailableError:
                continue
            return found.metadata.resource_version if found else 0


@pytest.mark.parametrize("seed", range(2))
async def test_nothing_acknowledged_is_lost(server: EmbeddedNats, seed: int) -> None:
    async with open_store(server) as store:
        load = Load(store, seed)
        async with asyncio.TaskGroup() as tasks:
            for i in range(6):
                tasks.create_task(load.write(f"lone{i}", 1))
            for i in range(4):
                tasks.create_task(load.write(f"pair{i}", 2))
            tasks.create_task(load.write("many", 60))
            for _ in range(KILLS):
                await load.progress()
                await crash(server)
            await load.progress()
            load.is_over = True
        await check(store, load)
    assert server.restarts == KILLS


async def check(store: JetStreamStore, load: Load) -> None:
    items = {item.ref: item for item in (await store.list()).items}
    # All writers have ended, so the newest acknowledged version is the newest one.
    current = {ref: revision for ref, revision in load.acked.items() if revision}
    assert {ref: item.metadata.resource_version for ref, item in items.items()} == current
    for group, size in load.groups.items():
        members = [items.get(Ref("Node", "", f"{group}-{i}")) for i in range(size)]
        numbers = {m.metadata.annotations["number"] if m else None for m in members}
        assert len(numbers) == 1, f"{group} is not whole: {numbers}"
        for i in (0, size - 1):
            ref = Ref("Node", "", f"{group}-{i}")
            entries = await store.history(ref, limit=100_000)
            revisions = [entry.revision for entry in entries]
            assert revisions == sorted(set(revisions))
            assert (entries[-1].resource if entries else None) == items.get(ref)


async def test_a_lone_writer_alone(server: EmbeddedNats) -> None:
    """Only lone changes, which take the quick way: each crash may cut one in the middle."""
    async with open_store(server) as store:
        load = Load(store, 7)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load.write("lone", 1))
            for _ in range(6):
                await load.progress()
                await crash(server)
            await load.progress()
            load.is_over = True
        await check(store, load)
