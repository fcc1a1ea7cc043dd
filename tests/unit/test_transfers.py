"""The composition of a node's storages and publishers."""

import asyncio
import threading
from pathlib import Path

import pytest

from bacalhau.publishers.s3 import S3Publisher
from bacalhau.serve.transfers import Transfers
from bacalhau.settings import ServeSettings, TransferSettings
from bacalhau.storages.pins import MemoryPins
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.threads import THREADS_MAX
from bacalhau_api.errors import TransientError
from tests.support.inputs import USE, item

REMOTE = ("urlDownload", "s3", "ipfs", "git", "fsspec")


def made(place: Path, **transfers: object) -> Transfers:
    settings = ServeSettings(data_dir=place, transfers=TransferSettings(**transfers))  # type: ignore[arg-type]
    return Transfers(settings, "node", place / "node", "boot", MemoryPins())


async def test_types_are_spelled_as_jobs_spell_them(tmp_path: Path) -> None:
    transfers = made(tmp_path, protocols=("gs",))
    storages, publishers = transfers.storages(), transfers.publishers()
    assert {"local", "inline", *REMOTE} <= set(storages)
    assert {"local", "s3", "ipfs"} <= set(publishers)
    available = {name for name, one in storages.items() if (await one.health()).is_available}
    assert {"inline", "urlDownload", "s3", "git", "fsspec"} <= available
    assert not {"ipfs", "local"} & available, "these need the operator's word"
    await transfers.close()


async def test_settings_reach_the_storages(tmp_path: Path) -> None:
    closed = made(tmp_path / "a")
    opened = made(tmp_path / "b", addresses=("127.0.0.1:80",), s3_endpoints=("http://127.0.0.1:1",))
    url = item("urlDownload", url="http://127.0.0.1:80/x").source
    s3 = item("s3", bucket="data", key="x", endpoint="http://127.0.0.1:1").source
    for source in (url, s3):
        assert await closed.storages()[source.type].admit(source)
        assert not await opened.storages()[source.type].admit(source)
    await closed.close()
    await opened.close()


async def test_a_node_whose_cache_cannot_be_opened_still_starts(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "cache").write_text("in the way")
    transfers = made(tmp_path)
    storages = transfers.storages()
    assert (await storages["inline"].health()).is_available
    for name in REMOTE:
        health = await storages[name].health()
        assert not health.is_available
        assert "input cache" in health.reason
        with pytest.raises(TransientError):
            await storages[name].fetch(item(name), tmp_path, USE)
    assert (await transfers.publishers()["s3"].health()).is_available
    await transfers.close()


async def test_downloads_that_stand_still_hold_up_no_result(tmp_path: Path) -> None:
    transfers = made(tmp_path)
    assert transfers.cache is not None
    go_on = threading.Event()
    try:
        downloads = [
            asyncio.create_task(transfers.cache.threads.run(Transfer(), go_on.wait, 60))
            for _ in range(THREADS_MAX)
        ]
        await asyncio.sleep(0)
        publisher = transfers.publishers()["s3"]
        assert isinstance(publisher, S3Publisher)
        async with asyncio.timeout(20):
            await publisher._threads.run(Transfer(), lambda: None)
    finally:
        go_on.set()
    await asyncio.gather(*downloads)
    await transfers.close()
