"""`gitops run` and the commands of operators, against a real API server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from bacalhau.cli import exits
from bacalhau.cli.app import run
from bacalhau.client.aio import AsyncClient
from bacalhau.gitops.remote import RemoteStore
from bacalhau.gitops.wire import (
    LeaseRequest,
    LetGoRequest,
    OrderItem,
    OrdersRequest,
    SourceRequest,
    let_go,
    orders,
    put,
)
from bacalhau.gitops.wire import lease as lease_call
from bacalhau.system import SystemClock
from bacalhau_api.errors import ConflictError, FencedError, NotFoundError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.source import Claim, Source, claim_ref
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.memory import MemoryStore
from tests.support.api_objects import stored_job
from tests.support.api_server import RunningServer, running_server
from tests.support.gitops import manifest
from tests.support.repo import Repo

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with running_server(tmp_path / "nodes") as started:
        yield started


@pytest.fixture
def bacalhau(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setenv("BACALHAU_SERVER", server.url)
    return lambda *words: run([str(word) for word in words])


@pytest.fixture
def fleet(tmp_path: Path) -> Repo:
    repo = Repo(tmp_path / "fleet")
    repo.write(**{f"j{i}": manifest(f"j{i}") for i in range(6)})
    repo.commit()
    return repo


def jobs(server: RunningServer) -> list[str]:
    return sorted(item.name for item in server.all("Job") if not item.is_deleting)


def source(server: RunningServer, name: str = "fleet") -> Source:
    found = server.get(Ref("Source", "", name))
    assert isinstance(found, Source)
    return found


def finish_deletions(server: RunningServer) -> None:
    for item in server.all("Job"):
        if item.is_deleting:
            server.drop(item.ref)


def once(bacalhau: Callable[..., int], repo: Repo, *words: object) -> int:
    return bacalhau("gitops", "run", repo.root, "--once", "--timeout", 60, *words)


def test_a_directory_is_applied_from_anywhere(
    server: RunningServer,
    bacalhau: Callable[..., int],
    fleet: Repo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert once(bacalhau, fleet) == exits.OK
    assert jobs(server) == [f"j{i}" for i in range(6)]
    commit = fleet.git("rev-parse", "HEAD")
    status = source(server).status
    assert (status.phase, status.revision_applied, status.counts.objects) == ("Synced", commit, 6)
    claim = server.get(claim_ref(Ref("Job", "default", "j0")))
    job = server.get(Ref("Job", "default", "j0"))
    assert isinstance(claim, Claim)
    assert job
    assert (claim.spec.uid, claim.spec.file) == (job.metadata.uid, "j0.yaml")
    history = server.call(server.state.store.history(job.ref))
    assert [(e.actor, e.reason) for e in history] == [("source/fleet", "Created")]
    assert f"from j0.yaml at {commit[:12]}" in history[0].message
    version = job.metadata.resource_version
    assert once(bacalhau, fleet) == exits.OK
    assert server.get(job.ref).metadata.resource_version == version  # type: ignore[union-attr]
    assert "Synced" in capsys.readouterr().out


def test_prune_approve_restore(
    server: RunningServer,
    bacalhau: Callable[..., int],
    fleet: Repo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    once(bacalhau, fleet)
    (fleet.root / "j0.yaml").unlink()
    fleet.commit()
    assert once(bacalhau, fleet) == exits.OK
    assert "j0" not in jobs(server)
    for i in (1, 2):
        (fleet.root / f"j{i}.yaml").unlink()
    fleet.commit()
    assert once(bacalhau, fleet) == exits.ERROR
    assert len(jobs(server)) == 5
    assert bacalhau("gitops", "status", "fleet") == exits.ERROR
    told = capsys.readouterr().out
    assert "Held back:  2 deletions (TooMany)" in told
    assert "Job default/j1" in told
    assert bacalhau("gitops", "approve", "fleet", "--digest", "0123") == exits.ERROR
    assert bacalhau("gitops", "approve", "fleet") == exits.USAGE  # nobody to ask
    assert bacalhau("gitops", "approve", "fleet", "--yes") == exits.OK
    assert once(bacalhau, fleet) == exits.OK
    assert jobs(server) == ["j3", "j4", "j5"]
    assert bacalhau("gitops", "approve", "fleet", "--yes") == exits.ERROR
    assert "nothing back" in capsys.readouterr().err
    finish_deletions(server)
    assert bacalhau("gitops", "restore", "fleet", "job/j1", "nope") == exits.NOT_FOUND
    assert once(bacalhau, fleet) == exits.OK
    assert jobs(server) == ["j1", "j3", "j4", "j5"]
    assert bacalhau("explain", "source", "fleet") == exits.OK
    assert bacalhau("explain", "claim", "job.j2") == exits.OK
    assert "gitops restore fleet job/j2" in capsys.readouterr().out
    assert bacalhau("gitops", "status", "fleet", "--objects") == exits.OK
    assert "j1.yaml" in capsys.readouterr().out


def test_modes_and_suspension(
    server: RunningServer,
    bacalhau: Callable[..., int],
    fleet: Repo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert once(bacalhau, fleet, "--mode", "detect") == exits.ERROR
    assert jobs(server) == []
    assert bacalhau("gitops", "status", "fleet") == exits.ERROR
    assert "create Job default/j3" in capsys.readouterr().out
    assert bacalhau("gitops", "set", "fleet", "--mode", "enforce") == exits.OK
    assert bacalhau("gitops", "suspend", "fleet", "--for", "1h", "-m", "disk") == exits.OK
    assert once(bacalhau, fleet) == exits.OK
    assert jobs(server) == []
    status = source(server).status
    assert status.waiting
    assert status.waiting.until is not None
    assert status.waiting.until - status.waiting.since <= timedelta(hours=1)
    assert bacalhau("gitops", "status") == exits.OK
    assert "Suspended" in capsys.readouterr().out
    assert bacalhau("gitops", "suspend", "fleet", "--for", "for ever") == exits.USAGE
    assert bacalhau("gitops", "suspend", "fleet", "--for", "1000d") == exits.USAGE
    assert bacalhau("gitops", "resume", "fleet") == exits.OK
    assert once(bacalhau, fleet) == exits.OK
    assert len(jobs(server)) == 6
    assert bacalhau("gitops", "set", "fleet", "--mode", "of") == exits.USAGE
    assert bacalhau("gitops", "resume", "nope") == exits.NOT_FOUND
    assert bacalhau("gitops", "run", fleet.root, "--name", "a b") != exits.OK


def test_problems_are_told_by_file_and_line(
    server: RunningServer,
    bacalhau: Callable[..., int],
    fleet: Repo,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fleet.write(j1=manifest("j1").replace("batch", "bitch"), j2=manifest("j2", prune="x"))
    fleet.commit()
    assert once(bacalhau, fleet) == exits.ERROR
    assert jobs(server) == ["j0", "j3", "j4", "j5"]
    told = capsys.readouterr().err
    assert "j1.yaml:6" in told
    assert "j2.yaml:1" in told


def test_a_deleted_source_and_its_objects(
    server: RunningServer, bacalhau: Callable[..., int], fleet: Repo
) -> None:
    once(bacalhau, fleet)
    assert bacalhau("delete", "source", "fleet") == exits.OK
    assert len(jobs(server)) == 6
    assert bacalhau("get", "claims") == exits.OK


async def test_one_runner_at_a_time(server: RunningServer) -> None:
    """And what a runner does that has lost its lease is refused, write by write."""
    async with AsyncClient(server.url) as client:
        await client.send(put("fleet", SourceRequest()))
        clock = SystemClock()
        store = RemoteStore(client, clock, "fleet")
        first = await store.acquire_lease("x", "one", 10)
        assert first
        assert await store.acquire_lease("x", "two", 10) is None
        first = await store.renew_lease(first, 10)
        item = OrderItem(manifest=_wire("a"), file="a.yaml", line=1)
        good = OrdersRequest(token=first.token, orders=(item,))
        done = await client.send(orders("fleet", good))
        assert [i.outcome for i in done.items] == ["created"]
        await store.release_lease(first)
        second = await store.acquire_lease("x", "two", 10)
        assert second
        with pytest.raises(FencedError):
            await store.renew_lease(first, 10)
        stale = OrdersRequest(token=first.token, orders=(item.but(manifest=_wire("b")),))
        with pytest.raises(ConflictError) as lost:
            await client.send(orders("fleet", stale))
        assert lost.value.reason == "LeaseLost"
        uid = server.get(Ref("Job", "default", "a")).metadata.uid  # type: ignore[union-attr]
        gone = LetGoRequest(token=first.token, action="prune", claims=(("default", "job.a", uid),))
        with pytest.raises(ConflictError):
            await client.send(let_go("fleet", gone))
        assert jobs(server) == ["a"]
        again = gone.but(token=second.token, claims=(("default", "job.a", "another"),))
        assert (await client.send(let_go("fleet", again))).items == ()
        assert jobs(server) == ["a"]
        answer = await client.send(
            lease_call("fleet", LeaseRequest(holder="three", ttl_seconds=10))
        )
        assert answer.token == 0
        assert await store.get(Ref("Job", "default", "nope")) is None
        with pytest.raises(NotFoundError):
            await client.send(orders("nope", good))


async def test_the_view_follows_a_store_that_was_made_anew(server: RunningServer) -> None:
    """Its revisions begin again, below those that were seen."""
    cache = Cache()

    def put(count: int) -> None:
        job = stored_job("train")
        server.put(job.but(spec=job.spec.but(count=count)))

    async def renew(epoch: str) -> None:
        store = server.state.store
        assert isinstance(store, MemoryStore)
        store.recreate(epoch)

    async def tells(*counts: int) -> None:
        async with asyncio.timeout(10):
            while counts != tuple(  # noqa: ASYNC110 - a thread of its own serves
                job.spec.count for job in cache.list("Job") if isinstance(job, Job)
            ):
                await asyncio.sleep(0.05)

    async with AsyncClient(server.url) as client:
        following = asyncio.create_task(RemoteStore(client, SystemClock(), "fleet").follow(cache))
        for count in range(2, 6):
            await asyncio.to_thread(put, count)
        await tells(5)
        await asyncio.to_thread(server.call, renew("from a backup"))
        await asyncio.to_thread(put, 3)
        await tells(3)
        await asyncio.to_thread(put, 9)
        await tells(9)
        await asyncio.to_thread(server.call, renew("empty"))
        await tells()
        await asyncio.to_thread(put, 1)
        await tells(1)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def _wire(name: str) -> dict[str, object]:
    from bacalhau_api.jobfile import parse_manifests

    (document,) = parse_manifests(manifest(name))
    assert isinstance(document.resource, Job)
    return document.resource.wire()


def test_a_runner_that_is_killed_and_one_that_follows_hooks(
    server: RunningServer, fleet: Repo
) -> None:
    """A process of its own, killed with -9; the next one goes on. Commits wake it."""
    words = [
        sys.executable, "-m", "bacalhau", "--server", server.url, "gitops", "run",
        str(fleet.root), "--sweep", "3600",
    ]  # fmt: skip
    paths = os.pathsep.join(str(ROOT / p) for p in (".", "api", "controllers"))
    environment = {**os.environ, "PYTHONPATH": paths}

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)

    process = start()
    try:
        _eventually(lambda: len(jobs(server)) == 6)
        process.kill()
        process.wait(10)
        fleet.write(k=manifest("k"))
        fleet.commit()
        process = start()
        _eventually(lambda: "k" in jobs(server))  # once the lease of the dead one has ended
        fleet.write(l=manifest("l"))
        commit = fleet.commit()
        _eventually(lambda: source(server).status.revision_applied == commit)
        assert "l" in jobs(server)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)


def _eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not check():
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.1)


def test_the_wire_is_json(server: RunningServer, bacalhau: Callable[..., int]) -> None:
    assert bacalhau("gitops", "set", "x", "--ignore", "a/", "--max-prune", 5) == exits.OK
    found = source(server, "x")
    assert (found.spec.ignore, found.spec.max_prune_percent) == (("a/",), 5)
    assert json.loads(found.encode())["kind"] == "Source"
