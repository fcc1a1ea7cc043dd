"""IPFS inputs and the IPFS publisher over real nodes that exchange blocks with each other."""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau.publishers.ipfs import IpfsPublisher
from bacalhau.storages.cache import InputCache
from bacalhau.storages.ipfs import IpfsStorage
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Fetched
from tests.support.inputs import MIB, USE, input_cache, item, tree
from tests.support.ipfs import IpfsNode, ipfs_node
from tests.support.outputs import make_outputs, publication_to

ABSENT = "bafybeigdyrzt5sfp7udm7hu76uh7y26nf3efuylqabf3oclgtqy55fbzdi"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[IpfsNode, IpfsNode]]:
    place = tmp_path_factory.mktemp("ipfs")
    with ipfs_node(place / "one") as one, ipfs_node(place / "two") as two:
        two.connect(one)
        yield one, two


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[InputCache]:
    async with input_cache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def threads() -> Iterator[TransferThreads]:
    threads = TransferThreads()
    yield threads
    threads.close()


def storage_on(
    cache: InputCache, api: str = "", gateway: str = "", seconds: float = 30.0, size: int = 32 * MIB
) -> IpfsStorage:
    return IpfsStorage(cache, api=api, gateway=gateway, stall_seconds=seconds, size_bytes_max=size)


async def fetch(storage: IpfsStorage, into: Path, cid: str) -> Fetched:
    os.makedirs(into, exist_ok=True)
    return await storage.fetch(item("ipfs", cid=cid), into, USE)


async def added(node: IpfsNode, threads: TransferThreads, place: Path) -> str:
    """Publish some outputs on a node; their CID."""
    big = {"tables/big.bin": hashlib.sha256(b"seed").digest() * 100_000}
    outputs = make_outputs(place / "outputs", big)
    publisher = IpfsPublisher(api=node.url, threads=threads)
    location = await publisher.publish(publication_to(SpecConfig(type="ipfs")), outputs)
    assert location.type == "ipfs"
    return str(location.params["cid"])


async def test_what_one_node_publishes_another_reads(
    nodes: tuple[IpfsNode, IpfsNode], cache: InputCache, threads: TransferThreads, tmp_path: Path
) -> None:
    one, two = nodes
    cid = await added(one, threads, tmp_path)
    assert await added(one, threads, tmp_path) == cid, "the same outputs have the same CID"
    assert cid in one.call("pin/ls")["Keys"]
    storage = storage_on(cache, api=two.url)
    health = await storage.health()
    assert health.is_available
    assert health.version
    fetched = await fetch(storage, tmp_path / "in", cid)
    assert tree(fetched.source) == tree(tmp_path / "outputs")
    assert fetched.read_only


@pytest.mark.parametrize("way", ["api", "gateway"])
async def test_directories_files_and_paths(
    nodes: tuple[IpfsNode, IpfsNode],
    cache: InputCache,
    threads: TransferThreads,
    tmp_path: Path,
    way: str,
) -> None:
    cid = await added(nodes[0], threads, tmp_path)
    storage = storage_on(cache, **{way: nodes[0].url})  # type: ignore[arg-type]
    assert (await storage.health()).is_available
    whole = await fetch(storage, tmp_path / "1", f"/ipfs/{cid}")
    assert tree(whole.source) == tree(tmp_path / "outputs")
    below = await fetch(storage, tmp_path / "2", f"{cid}/tables")
    assert set(tree(below.source)) == {"a.csv", "big.bin"}
    file = await fetch(storage, tmp_path / "3", f"{cid}/tables/a.csv")
    assert file.source.is_file(), "a CID of a file is that file"
    assert file.source.read_bytes() == b"a,b\n1,2\n"
    assert (below.source / "a.csv").samefile(whole.source / "tables" / "a.csv"), "kept once"


async def test_what_is_here_needs_no_ipfs(
    nodes: tuple[IpfsNode, IpfsNode], cache: InputCache, threads: TransferThreads, tmp_path: Path
) -> None:
    cid = await added(nodes[0], threads, tmp_path)
    await fetch(storage_on(cache, api=nodes[0].url), tmp_path / "1", cid)
    again = await fetch(storage_on(cache, api="http://127.0.0.1:9"), tmp_path / "2", cid)
    assert tree(again.source) == tree(tmp_path / "outputs")


@pytest.mark.parametrize("way", ["api", "gateway"])
async def test_a_cid_that_nobody_has_is_given_up(
    nodes: tuple[IpfsNode, IpfsNode], cache: InputCache, tmp_path: Path, way: str
) -> None:
    """IPFS itself would wait for ever."""
    storage = storage_on(cache, seconds=0.5, **{way: nodes[1].url})  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="took too long"):
        await fetch(storage, tmp_path / "in", ABSENT)
    assert [p for p in os.listdir(tmp_path / "cache" / "partial") if p.endswith(".d")] == []


async def test_a_server_that_says_nothing_can_be_left(cache: InputCache, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        wish = asyncio.create_task(fetch(storage_on(cache, api=url), tmp_path / "in", ABSENT))
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            wish.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(wish, 20)


async def test_what_is_not_there(
    nodes: tuple[IpfsNode, IpfsNode], cache: InputCache, threads: TransferThreads, tmp_path: Path
) -> None:
    cid = await added(nodes[0], threads, tmp_path)
    storage = storage_on(cache, api=nodes[0].url)
    with pytest.raises(TerminalError, match="IPFS has no"):
        await fetch(storage, tmp_path / "in", f"{cid}/absent")
    small = storage_on(cache, api=nodes[0].url, size=1000)
    with pytest.raises(TerminalError, match=r"more than 1000 bytes|at most 1000"):
        await fetch(small, tmp_path / "in", cid)
    for wrong in (f"{cid}/../x", "no cid!"):
        assert await storage.admit(item("ipfs", cid=wrong).source)


async def test_without_an_address_it_is_not_offered(
    cache: InputCache, threads: TransferThreads, tmp_path: Path
) -> None:
    health = await storage_on(cache).health()
    assert not health.is_available
    assert "--ipfs-api" in health.reason
    publisher = IpfsPublisher(api="", threads=threads)
    assert "--ipfs-api" in (await publisher.health()).reason
    dead = IpfsPublisher(api="http://127.0.0.1:9", threads=threads)
    assert not (await dead.health()).is_available
    outputs = make_outputs(tmp_path / "outputs")
    with pytest.raises(TransientError):
        await dead.publish(publication_to(SpecConfig(type="ipfs")), outputs)
