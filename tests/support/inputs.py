"""An input cache on a real disk, for tests of storages."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from bacalhau.storages.cache import InputCache
from bacalhau.storages.content import ContentStore
from bacalhau.transfer.addresses import AddressPolicy, AllowedAddress
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Use

MIB = 1024 * 1024
USE = Use(namespace="default", execution="job-0-0")
LOOPBACK = AddressPolicy([AllowedAddress.parse("127.0.0.0/8")])
"""Lets tests reach servers of their own."""


def item(kind: str, **params: object) -> InputSource:
    """One input of a job."""
    return InputSource(source=SpecConfig(type=kind, params=params), target="/inputs/x")


@contextlib.asynccontextmanager
async def input_cache(
    root: Path, *, bytes_max: int = 64 * MIB, boot: str = "boot"
) -> AsyncIterator[InputCache]:
    """A cache that is open within the block."""
    cache = InputCache(ContentStore(root, bytes_max=bytes_max, boot=boot), TransferThreads())
    try:
        yield cache
    finally:
        await cache.close()


def tree(root: Path) -> dict[str, bytes]:
    """All files below a directory, by path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
