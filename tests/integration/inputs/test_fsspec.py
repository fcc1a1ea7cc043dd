"""fsspec inputs, over a real FTP server."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau.storages.cache import InputCache
from bacalhau.storages.fsspec import FsspecStorage
from bacalhau.storages.protocols import check_protocol
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.runner.ports import Fetched
from tests.support.inputs import MIB, USE, input_cache, item, tree


@contextlib.contextmanager
def ftp_server(root: Path) -> Iterator[str]:
    """A directory by anonymous FTP; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "pyftpdlib", "-i", "127.0.0.1", "-p", str(port), "-d", str(root)]
    with (root.parent / "ftp.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", *command], stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except ConnectionRefusedError:
                words = (root.parent / "ftp.log").read_text()
                assert process.poll() is None, words
                assert time.monotonic() < deadline, words
                time.sleep(0.05)
        yield f"ftp://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    (tmp_path / "ftp" / "sub").mkdir(parents=True)
    with ftp_server(tmp_path / "ftp") as url:
        yield tmp_path / "ftp", url


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[InputCache]:
    async with input_cache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def storage(cache: InputCache) -> FsspecStorage:
    return FsspecStorage(cache, protocols=["ftp"], size_bytes_max=4 * MIB)


async def fetch(storage: FsspecStorage, into: Path, url: str) -> Fetched:
    os.makedirs(into, exist_ok=True)
    return await storage.fetch(item("fsspec", url=url), into, USE)


async def test_files_and_directories(
    served: tuple[Path, str], storage: FsspecStorage, tmp_path: Path
) -> None:
    root, url = served
    (root / "a.csv").write_bytes(b"a" * 3_000_000)
    (root / "sub" / "b.csv").write_bytes(b"b")
    file = await fetch(storage, tmp_path / "1", f"{url}/a.csv")
    assert tree(file.source) == {"a.csv": b"a" * 3_000_000}
    assert file.read_only
    whole = await fetch(storage, tmp_path / "2", f"{url}/sub/")
    assert tree(whole.source) == {"b.csv": b"b"}


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "does not allow the protocol 'file'"),
        ("memory://x", "does not allow the protocol"),
        ("simplecache::ftp://127.0.0.1/x", "without '::'"),
        ("ftp://127.0.0.1/x::file:///etc/passwd", "without '::'"),
        ("/etc/passwd", "must be like"),
        ("gs://bucket/x", "--allow-protocol"),
        ("ftp://user:hunter2@127.0.0.1/x", "user name or password"),
    ],
)
async def test_urls_that_are_refused(
    storage: FsspecStorage, tmp_path: Path, url: str, words: str
) -> None:
    reason = await storage.admit(item("fsspec", url=url).source)
    assert words in reason
    assert "hunter2" not in reason
    with pytest.raises(TerminalError):
        await fetch(storage, tmp_path / "in", url)


@pytest.mark.parametrize(
    "name", ["file", "FILE", "local", "memory", "dir", "reference", "zip", "filecache", "a::b", ""]
)
def test_protocols_that_nobody_can_allow(name: str) -> None:
    with pytest.raises(ValueError, match=r"disk|fsspec protocol"):
        check_protocol(name)
    with pytest.raises(ValueError, match="source type s3"):
        check_protocol("s3")


async def test_without_protocols_it_is_not_offered(cache: InputCache) -> None:
    health = await FsspecStorage(cache, protocols=[], size_bytes_max=MIB).health()
    assert not health.is_available


async def test_what_cannot_be_had(
    served: tuple[Path, str], cache: InputCache, storage: FsspecStorage, tmp_path: Path
) -> None:
    root, url = served
    with pytest.raises(TerminalError, match="no such file"):
        await fetch(storage, tmp_path / "1", f"{url}/absent")
    (root / "big").write_bytes(bytes(5 * MIB))
    with pytest.raises(TerminalError, match="--input-max-size"):
        await fetch(storage, tmp_path / "2", f"{url}/big")
    with pytest.raises(TransientError):
        await fetch(storage, tmp_path / "3", "ftp://127.0.0.1:9/x")
    lacking = FsspecStorage(cache, protocols=["gs"], size_bytes_max=MIB)
    with pytest.raises(TerminalError, match="lacks the Python package"):
        await fetch(lacking, tmp_path / "4", "gs://bucket/x")
