"""Shortens the history of a namespace: by age, and by bytes.

Each entry carries a time to live of its own, set when it is written; this is for limits that were
lowered since, and for those of size, which no server knows of per namespace. What is too old or too
much is removed by one request that names the first message to stay. The sizes are asked for without
the contents.
"""

import asyncio
from datetime import datetime
from typing import Final

from bacalhau.store.codec import history_of_namespace
from bacalhau.store.feed import Feed, FeedLostError
from bacalhau.store.stream import Stream
from bacalhau_api.errors import UnavailableError

SIZE: Final = "Nats-Msg-Size"
SCAN_SECONDS: Final = 120.0
HEADERS_BYTES: Final = 400
"""About what the headers of an entry take, who changed what when; contents are counted exactly."""

_SIZES_ONLY: Final = {"deliver_policy": "all", "headers_only": True}


async def trim(
    stream: Stream,
    namespace: str,
    *,
    oldest: datetime | None,
    bytes_max: int | None,
    young: datetime | None,
) -> int:
    """See store.HistoryKeeper."""
    subjects = history_of_namespace(namespace)
    if oldest is not None:
        await _purge(stream, subjects, await _first_since(stream, subjects, oldest))
    if bytes_max is None:
        return 0
    sizes = await _sizes(stream, subjects)
    total = sum(size for _, size in sizes)
    if total <= bytes_max:
        return total
    keep_from = await _first_since(stream, subjects, young) if young is not None else None
    end = 0
    for sequence, size in sizes:
        if total <= bytes_max or (keep_from is not None and sequence >= keep_from):
            break
        total, end = total - size, sequence
    if end:
        await _purge(stream, subjects, end + 1)
    return total


async def _first_since(stream: Stream, subjects: str, moment: datetime) -> int:
    """The sequence of the first entry since a moment, or else of the next that will be stored."""
    coming = (await stream.info()).sequence_last + 1
    found = await stream.first_since(moment, subjects)
    return found.sequence if found is not None else coming


async def _purge(stream: Stream, subjects: str, keep_from: int) -> None:
    """Remove what lies before a sequence."""
    if keep_from > 1:
        body = {"filter": subjects, "seq": keep_from}
        await stream.api(f"$JS.API.STREAM.PURGE.{stream.name}", body)


async def _sizes(stream: Stream, subjects: str) -> list[tuple[int, int]]:
    """Sequence and bytes of each entry there is now, in order."""
    feed = Feed(stream, subjects, _SIZES_ONLY)
    found: list[tuple[int, int]] = []
    try:
        async with asyncio.timeout(SCAN_SECONDS):
            await feed.open()
            while not feed.is_current:
                for item in await feed.read():
                    size = int((item.headers or {}).get(SIZE, "0"))
                    found.append((item.sequence, size + HEADERS_BYTES))
                await asyncio.sleep(0)
    except (TimeoutError, FeedLostError) as error:
        raise UnavailableError(
            f"the history of {subjects} could not be measured: {error}"
        ) from error
    finally:
        await feed.close()
    return found
