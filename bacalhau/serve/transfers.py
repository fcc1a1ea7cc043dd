"""What a node fetches with and publishes with: the plugs of both kinds over one cache, and one way to
S3. Each kind has threads of its own: slow downloads may take all of theirs, and results leave."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bacalhau import plugs
from bacalhau.settings import ServeSettings
from bacalhau.storages.cache import InputCache
from bacalhau.storages.content import ContentStore
from bacalhau.storages.pins import Pins
from bacalhau.transfer.addresses import AddressPolicy, AllowedAddress
from bacalhau.transfer.s3 import S3Access
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError
from bacalhau_api.params import Role, canonical_type
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Publisher, Storage, Use

logger = logging.getLogger(__name__)


class Transfers:
    """Storages and publishers of one node. `close` ends what is under way."""

    def __init__(
        self, settings: ServeSettings, node: str, data: Path, boot: str, pins: Pins
    ) -> None:
        self._settings = settings
        self._node = node
        transfers = settings.transfers
        self._size_max = transfers.input_bytes_max or transfers.cache_bytes
        self._pins = pins
        self._policy = AddressPolicy(
            [AllowedAddress.parse(text) for text in transfers.addresses],
            allow_private=transfers.allow_private,
        )
        self._access = S3Access(transfers.s3_endpoints)
        self._fetching = TransferThreads()
        self._publishing = TransferThreads()
        self._trouble = ""
        self.cache: InputCache | None = None
        try:
            store = ContentStore(data / "cache", bytes_max=transfers.cache_bytes, boot=boot)
            self.cache = InputCache(store, self._fetching)
        except TransientError as error:
            # A node with a full disk still has results to report and work to finish.
            logger.error("Failed to open the input cache", extra={"error": error.message})
            self._trouble = error.message

    def storages(self) -> dict[str, Storage]:
        """By type, as jobs spell it."""
        settings = self._settings
        cached: dict[str, Any] = {"cache": self.cache, "size_bytes_max": self._size_max}
        ipfs = {
            "api": settings.transfers.ipfs_api,
            "gateway": settings.transfers.ipfs_gateway,
            "stall_seconds": settings.transfers.ipfs_seconds,
        }
        arguments: dict[str, dict[str, Any]] = {
            "local": {"allowed": settings.allow_paths, "private": (settings.data_dir,)},
            "urlDownload": cached | {"policy": self._policy},
            "s3": cached | {"access": self._access, "pins": self._pins},
            "ipfs": cached | ipfs,
            "git": cached | {"policy": self._policy, "pins": self._pins},
            "fsspec": cached | {"protocols": settings.transfers.protocols},
        }
        found: dict[str, Storage] = dict(_made("storages", Role.SOURCE, arguments))
        if self._trouble:
            needy = [name for name, given in arguments.items() if "cache" in given]
            found |= {name: _Unusable(self._trouble) for name in needy if name in found}
        if "local" in found:
            found["localDirectory"] = found["localdirectory"] = found["local"]
        return found

    def publishers(self) -> dict[str, Publisher]:
        """By type, as jobs spell it."""
        threads = self._publishing
        arguments: dict[str, dict[str, Any]] = {
            "local": {"node": self._node},
            "s3": {"access": self._access, "threads": threads},
            "ipfs": {"api": self._settings.transfers.ipfs_api, "threads": threads},
        }
        return dict(_made("publishers", Role.PUBLISHER, arguments))

    async def close(self) -> None:
        """End what is under way; it is gone on with after the next start."""
        if self.cache is not None:
            await self.cache.close()
        self._fetching.close()
        self._publishing.close()


class _Unusable:
    """In place of storages whose cache could not be opened; a restart tries again."""

    def __init__(self, why: str) -> None:
        self._why = why

    async def health(self) -> Health:
        """See Storage."""
        return Health(is_available=False, reason=self._why)

    async def admit(self, source: SpecConfig) -> str:
        """See Storage."""
        return self._why

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """See Storage."""
        raise UnavailableError(self._why)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return None


def _made(
    kind: plugs.Kind, role: Role, arguments: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The plugs of one kind that can be imported; the others are named in the log."""
    found: dict[str, Any] = {}
    for name in plugs.plugs(kind):
        try:
            make: Any = plugs.load(kind, name)
        except BacalhauError as error:
            logger.warning("Plug is not available", extra={"plug": name, "why": error.message})
            continue
        known = canonical_type(role, name)
        found[known] = make(**arguments.get(known, {}))
    return found
