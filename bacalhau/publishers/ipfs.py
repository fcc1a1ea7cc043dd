"""Outputs into IPFS, through the RPC API of a Kubo node: added as one directory, and pinned there."""

import os
from collections.abc import Iterator
from pathlib import Path

from bacalhau.publishers import packing
from bacalhau.publishers.underway import UnderWay
from bacalhau.transfer.kubo import add_directory, kubo_health
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import TransientError
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Health, Progress

STALL_SECONDS = 300.0
"""Kubo may be busy writing; the runner bounds the try as a whole."""


class IpfsPublisher:
    """Adds outputs by `api`, an address that the operator gave; empty if there is none."""

    def __init__(self, *, api: str, threads: TransferThreads) -> None:
        self._api = api
        self._threads = threads
        self._under_way = UnderWay()

    async def health(self) -> Health:
        """Whether the API answers."""
        if not self._api:
            return Health(is_available=False, reason="this node has no IPFS API; see --ipfs-api")
        return await kubo_health(self._api)

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """Add all files; return the CID. Equal outputs have the same."""
        if not self._api:
            raise TransientError("this node has no IPFS API; see --ipfs-api")
        with self._under_way.begin(publication) as transfer:
            cid = await self._threads.run(transfer, self._add, publication, outputs, transfer)
        return SpecConfig(type="ipfs", params={"cid": cid})

    def progress(self, uid: str) -> Progress | None:
        """See Publisher."""
        return self._under_way.progress(uid)

    def _add(self, publication: Publication, outputs: Path, transfer: Transfer) -> str:
        try:
            paths = packing.sorted_files(outputs)
            transfer.total = packing.total_bytes(outputs)
        except OSError as error:
            raise TransientError(
                f"the outputs of {publication.spec.execution} cannot be read: {error.strerror}",
                reason="Disk",
            ) from error
        files = ((path, _pieces(outputs, path)) for path in paths)
        return add_directory(self._api, files, transfer, stall_seconds=STALL_SECONDS)


def _pieces(outputs: Path, path: str) -> Iterator[bytes]:
    file = packing.open_output(outputs, path)
    with open(file, "rb", buffering=0) as stream:
        left = os.fstat(file).st_size
        while left > 0:
            data = stream.read(min(left, packing.BLOCK_BYTES))
            if not data:
                raise TransientError(f"the output {path} changed while it was published")
            left -= len(data)
            yield data
