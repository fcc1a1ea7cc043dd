"""Pins listings of inputs through the orchestrator; see `bacalhau.storages.pins`."""

import asyncio
import base64
import binascii
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from bacalhau.storages.objects import Entry
from bacalhau.storages.pins import EVERYBODY, Propose, mine, read_part
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.v1.manifest import ManifestSpec, PartRange
from bacalhau_api.wire import PinReply, PinRequest, Refused
from bacalhau_controllers.runner.ports import Use

KEPT_MAX = 256
TRIES_MAX = 3

_FOR_GOOD = frozenset({"ListingTooLong"})


class PinLine(Protocol):
    """The way to the orchestrator."""

    async def pin(self, ask: PinRequest) -> PinReply | Refused:
        """Ask; node and session are filled in. Raises UnavailableError without an answer."""
        ...


class LinkPins:
    """Pins of one node. Listings are made once on a node, however many partitions it has."""

    def __init__(self, line: PinLine) -> None:
        self._line = line
        self._known: OrderedDict[tuple[str, int, int], ManifestSpec] = OrderedDict()
        self._locks: dict[tuple[str, int, int], tuple[asyncio.Lock, int]] = {}

    async def share(self, use: Use, propose: Propose) -> Sequence[Entry]:
        """See Pins."""
        key = (use.job_uid, use.generation, use.index)
        manifest = self._known.get(key)
        if manifest is None:
            lock, users = self._locks.get(key, (asyncio.Lock(), 0))
            self._locks[key] = (lock, users + 1)
            try:
                async with lock:
                    manifest = self._known.get(key) or await self._pinned(use, propose)
            finally:
                lock, users = self._locks.pop(key)
                if users > 1:
                    self._locks[key] = (lock, users - 1)
            self._known[key] = manifest
            while len(self._known) > KEPT_MAX:
                self._known.popitem(last=False)
        if manifest.partitions != use.partitions:
            raise TerminalError(
                f"the manifest of input {use.index} is for {manifest.partitions} partitions, not "
                f"{use.partitions}",
                reason="InputChanged",
            )
        return await self._share(use, manifest)

    async def _pinned(self, use: Use, propose: Propose) -> ManifestSpec:
        """The manifest that counts: the one there is, or else ours, or else who was faster."""
        found = await self._ask(use, action="find")
        if found.manifest is not None:
            return found.manifest
        proposed = await propose()
        parts = await asyncio.to_thread(proposed.parts)
        digest = await asyncio.to_thread(lambda: proposed.digest)
        sums = await asyncio.to_thread(proposed.sizes)
        for number, part in enumerate(parts):
            data = base64.b64encode(part.data).decode()
            await self._ask(use, action="put", part=number, digest=digest, data=data)
        spec = ManifestSpec(
            job="",
            job_uid=use.job_uid,
            generation=use.generation,
            input=use.index,
            digest=digest,
            objects=len(proposed.lines),
            size_bytes=sum(entry.size_bytes for _, entry in proposed.lines),
            partitions=use.partitions,
            partitions_empty=sum(1 for objects, _ in sums if not objects),
            objects_max=max((objects for objects, _ in sums), default=0),
            size_bytes_max=max((size for _, size in sums), default=0),
            parts=tuple(PartRange(first=part.first, last=part.last) for part in parts),
        )
        made = await self._ask(use, action="make", manifest=spec)
        if made.manifest is None:
            raise UnavailableError("the orchestrator did not say what the input is pinned to")
        return made.manifest

    async def _share(self, use: Use, manifest: ManifestSpec) -> list[Entry]:
        entries: list[Entry] = []
        for number, part in enumerate(manifest.parts):
            is_mine = part.first <= use.partition <= part.last
            if not is_mine and part.first != EVERYBODY:
                continue
            reply = await self._ask(use, action="read", part=number)
            if reply.manifest is None or reply.manifest.digest != manifest.digest:
                raise UnavailableError("the manifest of the input was replaced; it is asked again")
            try:
                lines = await asyncio.to_thread(read_part, base64.b64decode(reply.data))
            except (ValueError, binascii.Error) as error:
                raise UnavailableError(f"the manifest of the input is damaged: {error}") from error
            entries += mine(lines, use.partition)
        return entries

    async def _ask(
        self,
        use: Use,
        *,
        action: str,
        part: int = 0,
        digest: str = "",
        data: str = "",
        manifest: ManifestSpec | None = None,
    ) -> PinReply:
        ask = PinRequest.model_validate(
            {
                "node": "",
                "session": "",
                "action": action,
                "namespace": use.namespace,
                "execution": use.execution,
                "input": use.index,
                "part": part,
                "digest": digest,
                "data": data,
                "manifest": manifest,
            }
        )
        for attempt in range(TRIES_MAX):
            try:
                reply = await self._line.pin(ask)
            except TransientError:
                if attempt + 1 == TRIES_MAX:
                    raise
                continue
            if isinstance(reply, PinReply):
                return reply
            if reply.reason in _FOR_GOOD:
                raise TerminalError(reply.message, reason=reply.reason)
            raise UnavailableError(f"the input could not be pinned: {reply.message}")
        raise AssertionError("the loop returns or raises")
