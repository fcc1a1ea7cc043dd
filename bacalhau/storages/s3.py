"""Inputs from S3: one object, what lies below a prefix, or what a pattern matches.

The bucket is listed once; what the listing has is fetched in the version it names (by ETag), so a
set of files is never half of one state and half of another. Each object is kept by its version:
what is here already is not fetched again, by whatever job or prefix it was.
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bacalhau.params import read_params
from bacalhau.storages.cache import Fetch, Hold, InputCache, use_key
from bacalhau.storages.checksums import read_sha256
from bacalhau.storages.draft import Blob
from bacalhau.storages.objects import Entry, Selection, expression, narrowed, select
from bacalhau.storages.partition import Partitioner
from bacalhau.storages.pins import Pinned, Pins
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.s3 import Bucket, S3Access, error_code, is_plain_key, translated
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.params import S3Source
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

PART_BYTES = 4 * 1024 * 1024
"""Of a large object in one request."""

REQUESTS_MAX = 8
"""At a time on this node, each with at most PART_BYTES in memory."""

AHEAD_MAX = 4
"""Parts of one object that are asked for before they can be written."""

OBJECTS_MAX = 1_000_000
OBJECTS_AT_ONCE = 16
LIST_SECONDS = 600.0


class S3Storage:
    """Fetches objects. `pins` keeps what the first execution of a job listed for the others."""

    def __init__(
        self, cache: InputCache, access: S3Access, pins: Pins, *, size_bytes_max: int
    ) -> None:
        self._cache = cache
        self._access = access
        self._pins = pins
        self._size_bytes_max = size_bytes_max
        self._requests = asyncio.Semaphore(REQUESTS_MAX)

    async def health(self) -> Health:
        """Needs nothing but the network, which is asked only for jobs."""
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the endpoint is allowed and the params fit together. S3 is asked by `fetch`."""
        try:
            params = _params(source)
            return self._access.refusal(params.endpoint)
        except TerminalError as error:
            return error.message

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """A directory with the objects in it."""
        params = _params(item.source)
        selection = select(params.key)
        bucket = self._access.bucket(params.bucket, region=params.region, endpoint=params.endpoint)
        entries, is_pinned = await self._entries(params, selection, bucket, use)
        files = _paths(entries, selection)
        size = sum(entry.size_bytes for entry in entries)
        if size > self._size_bytes_max:
            raise TerminalError(
                f"{bucket.place.shown(params.key)} holds {size} bytes in {len(entries)} objects; "
                f"this node takes at most {self._size_bytes_max} for one input "
                "(--input-max-size)",
                reason="InputTooLarge",
            )
        wanted = read_sha256(params.checksum_sha256, "checksumSha256")
        async with self._cache.hold(into, use_key(item, use)) as hold:
            hold.total = size
            blobs = await self._obtain(hold, bucket, entries, wanted, is_pinned)
            source = await hold.place(dict(zip(files, blobs, strict=True)))
        return Fetched(source=source, read_only=True, size_bytes=size)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return self._cache.progress(into)

    # -- which objects ---------------------------------------------------------------------------

    async def _entries(
        self, params: S3Source, selection: Selection, bucket: Bucket, use: Use
    ) -> tuple[Sequence[Entry], bool]:
        """This use's objects, and whether they are pinned for all partitions."""

        async def propose() -> Pinned:
            found = await self._list(params, selection, bucket)
            return await self._cache.threads.quick(_share_out, params, selection, found, use)

        if use.partitions > 1:
            return await self._pins.share(use, propose), True
        return await self._list(params, selection, bucket), False

    async def _list(
        self, params: S3Source, selection: Selection, bucket: Bucket
    ) -> tuple[Entry, ...]:
        transfer = Transfer()
        work = self._cache.threads.run(transfer, _list, bucket, params, selection, transfer)
        found = narrowed(await asyncio.wait_for(work, LIST_SECONDS), selection, params.filter)
        if not found:
            raise TerminalError(
                f"nothing in {bucket.place.shown(params.key)} matches", reason="InputFailed"
            )
        return found

    # -- their bytes -----------------------------------------------------------------------------

    async def _obtain(
        self, hold: Hold, bucket: Bucket, entries: Sequence[Entry], wanted: str, is_pinned: bool
    ) -> list[Blob]:
        """All objects, in order; the first failure ends the rest."""
        blobs: list[Blob | None] = [None] * len(entries)
        todo = iter(enumerate(entries))

        async def work() -> None:
            for number, entry in todo:
                blobs[number] = await self._obtain_one(hold, bucket, entry, wanted, is_pinned)

        workers = [asyncio.create_task(work()) for _ in range(min(OBJECTS_AT_ONCE, len(entries)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return [blob for blob in blobs if blob is not None]

    async def _obtain_one(
        self, hold: Hold, bucket: Bucket, entry: Entry, wanted: str, is_pinned: bool
    ) -> Blob:
        async def bring(fetch: Fetch) -> Blob:
            return await self._bring(fetch, bucket, entry, wanted)

        where = f"{bucket.place.endpoint}/{bucket.place.bucket}/{entry.key}"
        version = f"{entry.version or entry.etag} {entry.size_bytes}"
        try:
            return await hold.obtain(f"s3:{where} {version} {wanted}", bring, is_fixed=True)
        except ChangedError as error:
            if not is_pinned:
                raise
            raise TerminalError(
                f"{error.message} since this job's objects were pinned; run the job again to "
                "work with what is there now",
                reason="InputChanged",
            ) from error

    async def _bring(self, fetch: Fetch, bucket: Bucket, entry: Entry, wanted: str) -> Blob:
        fetch.transfer.total = entry.size_bytes
        what = bucket.place.shown(entry.key)
        with translated(what):
            if not is_plain_key(entry.key):
                return await fetch.in_thread(_copy, fetch, bucket, entry, wanted)
            store = await fetch.threads.quick(lambda: bucket.store)
            if entry.size_bytes <= PART_BYTES:
                data = await self._part(store, entry, 0, entry.size_bytes, what)
                return await fetch.threads.quick(_write_whole, fetch, data, wanted)
            return await self._bring_parts(fetch, store, entry, wanted, what)

    async def _bring_parts(
        self, fetch: Fetch, store: Any, entry: Entry, wanted: str, what: str
    ) -> Blob:
        """Parts are asked for ahead, and written in order: what is on disk is always a beginning,
        from which a later try goes on."""
        draft, size = fetch.draft, entry.size_bytes
        at = await fetch.in_thread(draft.begin, f"{entry.etag} {entry.version}", size)
        fetch.transfer.done = at
        ahead: list[asyncio.Task[Any]] = []
        try:
            while at < size or ahead:
                while at < size and len(ahead) < AHEAD_MAX:
                    end = min(at + PART_BYTES, size)
                    part = self._part(store, entry, at, end, what)
                    ahead.append(asyncio.create_task(part))
                    at = end
                data = await ahead[0]
                ahead.pop(0)
                await fetch.threads.quick(draft.write, data)
                fetch.transfer.done = draft.size_bytes
                del data
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)
        return await fetch.threads.quick(draft.finish, "", wanted)

    async def _part(self, store: Any, entry: Entry, start: int, end: int, what: str) -> Any:
        import obstore

        options: Any = {}
        if entry.version:
            options["version"] = entry.version
        elif entry.etag:
            options["if_match"] = entry.etag
        if (start, end) != (0, entry.size_bytes):
            options["range"] = (start, end)
        async with self._requests:
            try:
                answer = await obstore.get_async(store, entry.key, options=options)
                data = await answer.bytes_async()
            except Exception as error:
                code = error_code(error)
                if code in ("PreconditionFailed", "NoSuchKey"):
                    raise ChangedError(f"{what} has changed or gone") from error
                raise
        if len(data) != end - start:
            raise ChangedError(f"{what} has changed")
        return data


class ChangedError(TransientError):
    """An object is not any more what the listing said. A new listing will tell."""

    reason = "InputChanged"


def _params(source: SpecConfig) -> S3Source:
    params = read_params(S3Source, source.params, what="source s3", reason="InvalidInput")
    selection = select(params.key)
    if params.filter:
        expression(params.filter, "filter")
    Partitioner(params.partition, selection.prefix, 2).check()
    read_sha256(params.checksum_sha256, "checksumSha256")
    for field, value in (
        ("versionId", params.version_id),
        ("checksumSha256", params.checksum_sha256),
    ):
        if value and not selection.is_single:
            raise TerminalError(
                f"source s3: params.{field} is of one object, but the key {params.key!r} means "
                "many",
                reason="InvalidInput",
            )
    return params


def _paths(entries: Sequence[Entry], selection: Selection) -> list[str]:
    """Where each object appears. Raises TerminalError where two would be in one place."""
    paths: list[str] = []
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    for entry in entries:
        path = selection.path(entry.key)
        parts = path.split("/")
        above = ["/".join(parts[:n]) for n in range(1, len(parts))]
        other = (
            files.get(path) or folders.get(path) or next(filter(None, map(files.get, above)), "")
        )
        if other:
            raise TerminalError(
                f"the objects {other[:200]!r} and {entry.key[:200]!r} would be a file and a "
                f"directory of the same name; leave one out with a filter",
                reason="InputFailed",
            )
        files[path] = entry.key
        folders.update(dict.fromkeys(above, entry.key))
        paths.append(path)
    return paths


# -- in threads ----------------------------------------------------------------------------------


def _list(
    bucket: Bucket, params: S3Source, selection: Selection, transfer: Transfer
) -> list[Entry]:
    what = bucket.place.shown(params.key)
    with translated(what, verb="list" if not selection.is_single else "read"):
        if selection.is_single:
            return [_head(bucket, params)]
        pages = bucket.client.get_paginator("list_objects_v2").paginate(
            Bucket=bucket.place.bucket, Prefix=selection.prefix
        )
        found: list[Entry] = []
        for page in pages:
            transfer.check()
            for one in page.get("Contents", ()):
                found.append(Entry(one["Key"], one["Size"], one.get("ETag", "")))
            if len(found) > OBJECTS_MAX:
                raise TerminalError(
                    f"{what} holds more than {OBJECTS_MAX} objects; name a narrower prefix",
                    reason="InputTooLarge",
                )
        return found


def _share_out(params: S3Source, selection: Selection, found: Sequence[Entry], use: Use) -> Pinned:
    partitioner = Partitioner(params.partition, selection.prefix, use.partitions)
    shares = partitioner.assign([entry.key for entry in found])
    return Pinned.of(found, shares, use.partitions)


def _head(bucket: Bucket, params: S3Source) -> Entry:
    given = {"VersionId": params.version_id} if params.version_id else {}
    head = bucket.client.head_object(Bucket=bucket.place.bucket, Key=params.key, **given)
    return Entry(params.key, head["ContentLength"], head.get("ETag", ""), version=params.version_id)


def _write_whole(fetch: Fetch, data: Any, wanted: str) -> Blob:
    """A small object: no use to go on with half of it."""
    fetch.draft.begin("", len(data))
    fetch.draft.write(data)
    fetch.transfer.done = len(data)
    return fetch.draft.finish("", wanted)


def _copy(fetch: Fetch, bucket: Bucket, entry: Entry, wanted: str) -> Blob:
    """By boto3: for keys of which obstore would make another path."""
    given: dict[str, str] = {"VersionId": entry.version} if entry.version else {}
    if entry.etag and not entry.version:
        given["IfMatch"] = entry.etag
    with translated(bucket.place.shown(entry.key)):
        answer = bucket.client.get_object(Bucket=bucket.place.bucket, Key=entry.key, **given)
        body = answer["Body"]
        forget = fetch.transfer.on_cancel(body.close)
        try:
            fetch.transfer.check()
            fetch.draft.begin("", entry.size_bytes)
            while data := body.read(256 * 1024):
                fetch.transfer.check()
                fetch.draft.write(data)
                fetch.transfer.done = fetch.draft.size_bytes
        finally:
            forget()
            body.close()
    if fetch.draft.size_bytes != entry.size_bytes:
        raise UnavailableError(f"{bucket.place.shown(entry.key)} broke off")
    return fetch.draft.finish("", wanted)
