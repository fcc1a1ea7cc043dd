"""Moves one large thing through an input or a publisher in a process of its own, and tells by how
much that process grew.

    python -m tests.support.memory_probe url|s3|s3-out|s3-out-plain|local-out DIRECTORY ADDRESS
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bacalhau.publishers.local import LocalPublisher
from bacalhau.publishers.s3 import S3Publisher
from bacalhau.storages.pins import MemoryPins
from bacalhau.storages.s3 import S3Storage
from bacalhau.storages.url import UrlStorage
from bacalhau.transfer.s3 import S3Access
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.v1.job import SpecConfig
from tests.support.inputs import LOOPBACK, USE, input_cache, item
from tests.support.outputs import publication_to
from tests.support.s3 import ADMIN

CACHE_BYTES = 64 * 1024**3
ROOT = Path(__file__).parents[2]


async def fetch_url(place: Path, url: str) -> None:
    """One file over HTTP."""
    async with input_cache(place / "cache", bytes_max=CACHE_BYTES) as cache:
        storage = UrlStorage(cache, LOOPBACK, size_bytes_max=CACHE_BYTES)
        await storage.fetch(item("urlDownload", url=url), place, USE)


async def fetch_s3(place: Path, url: str) -> None:
    """One object from S3: `address` and key in one URL."""
    url, _, key = url.rpartition("/")
    async with input_cache(place / "cache", bytes_max=CACHE_BYTES) as cache:
        access = S3Access([url])
        storage = S3Storage(cache, access, MemoryPins(), size_bytes_max=CACHE_BYTES)
        await storage.fetch(item("s3", bucket="data", key=key, endpoint=url), place, USE)


async def publish_s3(place: Path, url: str, encoding: str = "gzip") -> None:
    """Outputs to S3."""
    threads = TransferThreads()
    publisher = S3Publisher(S3Access([url]), threads)
    params = {"bucket": "data", "key": "out", "endpoint": url, "encoding": encoding}
    target = publication_to(SpecConfig(type="s3", params=params))
    await publisher.publish(target, place / "outputs")
    threads.close()


async def publish_plain(place: Path, url: str) -> None:
    """Outputs to S3, as they are."""
    await publish_s3(place, url, "plain")


async def publish_local(place: Path, _address: str) -> None:
    """Outputs that stay where they are."""
    target = publication_to(SpecConfig(type="local"))
    await LocalPublisher("node").publish(target, place / "outputs")


WORK: dict[str, Callable[[Path, str], Awaitable[None]]] = {
    "url": fetch_url,
    "s3": fetch_s3,
    "s3-out": publish_s3,
    "s3-out-plain": publish_plain,
    "local-out": publish_local,
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a probe took: bytes by which its process grew, and seconds."""

    grown_bytes: int
    seconds: float


def probe(kind: str, place: Path, address: str, *, timeout_seconds: float | None = None) -> Found:
    """Move something in a process of its own. Raises AssertionError if that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory_probe", kind, str(place), address],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        env={
            **os.environ, "AWS_ACCESS_KEY_ID": ADMIN[0], "AWS_SECRET_ACCESS_KEY": ADMIN[1],
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "api", ROOT / "controllers"))),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    return Found(int(found["grown_bytes"]), float(found["seconds"]))


def peak_bytes() -> int:
    """The most this process ever had in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not tell")


async def main() -> None:
    """Warm up on something small, so that modules and pools do not count; then the real thing."""
    kind, place, address = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    warm = place / "warm"
    (warm / "outputs").mkdir(parents=True)
    (warm / "outputs" / "x").write_bytes(os.urandom(20_000))
    small = address.replace("big.bin", "small.bin")
    await WORK[kind](warm, small)
    before = peak_bytes()
    began = time.perf_counter()
    await WORK[kind](place, address)
    seconds = time.perf_counter() - began
    print(json.dumps({"grown_bytes": peak_bytes() - before, "seconds": seconds}))


if __name__ == "__main__":
    asyncio.run(main())
