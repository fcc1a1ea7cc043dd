"""Outputs into a bucket: one tar.gz (`gzip`, the default), or each file for itself (`plain`).

Keys may hold {jobID}, {executionID}, {nodeID}, {partition}, {date} and {time}; the last two are of
the moment in which the result was accepted, so that each try has the same key. An upload of many
parts goes on where an earlier one was cut off, also after a restart of the agent: it compares the
parts that are there with those it would send.
"""

import contextlib
import hashlib
import itertools
import json
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from bacalhau.params import read_params
from bacalhau.publishers import packing
from bacalhau.publishers.underway import UnderWay
from bacalhau.transfer.progress import Transfer
from bacalhau.transfer.s3 import Bucket, S3Access, is_plain_key, translated
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.params import S3Publisher as S3Params
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Health, Progress

PART_BYTES = 6 * 1024 * 1024
PARTS_MAX = 9_000
"""S3 takes 10,000; headers and a file that grew leave room."""

PARTS_AT_ONCE = 3
FILES_AT_ONCE = 8
SMALL_BYTES = 1024 * 1024
LINK_SECONDS_MAX = 7 * 86400


class S3Publisher:
    """Uploads outputs with the node's credentials."""

    def __init__(self, access: S3Access, threads: TransferThreads) -> None:
        self._access = access
        self._threads = threads
        self._under_way = UnderWay()

    async def health(self) -> Health:
        """Needs nothing but the network, which is asked only for jobs."""
        return Health(is_available=True)

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        """Upload; return the place. Doing it again makes the same objects."""
        with self._under_way.begin(publication) as transfer:
            return await self._threads.run(transfer, self._publish, publication, outputs, transfer)

    def progress(self, uid: str) -> Progress | None:
        """See Publisher."""
        return self._under_way.progress(uid)

    # -- in a thread -----------------------------------------------------------------------------

    def _publish(self, publication: Publication, outputs: Path, transfer: Transfer) -> SpecConfig:
        params = read_params(
            S3Params,
            publication.spec.publisher.params,
            what="publisher s3",
            reason="InvalidPublisher",
        )
        bucket = self._access.bucket(params.bucket, region=params.region, endpoint=params.endpoint)
        key = object_key(params, publication)
        try:
            transfer.total = packing.total_bytes(outputs)
            if params.encoding == "plain":
                found = _Plain(bucket, key, outputs, transfer).run()
            else:
                side = outputs.parent / f"upload-{publication.metadata.uid}.json"
                found = _Archive(bucket, key, outputs, side, transfer).run()
        except TerminalError as error:
            if error.reason != "AccessDenied" or self._access.credentials is not None:
                raise
            raise UnavailableError(error.message) from error  # there may be some in a while
        except OSError as error:
            transfer.check()
            raise TransientError(
                f"the outputs of {publication.spec.execution} cannot be read: {error.strerror}",
                reason="Disk",
            ) from error
        place = {
            "bucket": params.bucket,
            "key": key,
            "region": params.region,
            "endpoint": params.endpoint,
            "encoding": params.encoding if params.encoding == "plain" else "",
            **found,
        }
        return SpecConfig(type="s3", params={k: v for k, v in place.items() if v})


def object_key(params: S3Params, publication: Publication) -> str:
    """The key with its placeholders filled in: `.tar.gz` at the end, or `/` for plain files."""
    spec, made = publication.spec, publication.metadata.creation_timestamp
    values = {
        "jobID": spec.job,
        "executionID": spec.execution,
        "nodeID": spec.node,
        "partition": str(spec.slot.partition),
        "date": made.strftime("%Y%m%d") if made else "",
        "time": made.strftime("%H%M%S") if made else "",
    }
    key = params.key
    for name, value in values.items():
        key = key.replace(f"{{{name}}}", value)
    if params.encoding == "plain":
        return key if key.endswith("/") else f"{key}/"
    return key if key.endswith((".tar.gz", ".tgz")) else f"{key}.tar.gz"


def presigned_link(access: S3Access, location: SpecConfig, seconds: int) -> str:
    """A link by which anybody can download an archive for so long, signed here and now.

    Made when it is asked for and never stored: who has it needs no other right. Raises
    TerminalError for what has no such link. Blocking.
    """
    params = dict(location.params)
    key = str(params.get("key", ""))
    if location.type != "s3" or not key or key.endswith("/"):
        raise TerminalError(
            "only results that are one archive in S3 have a link: those of the publisher s3 with "
            "the encoding gzip"
        )
    if not 0 < seconds <= LINK_SECONDS_MAX:
        raise TerminalError(f"a link lasts from 1 to {LINK_SECONDS_MAX} seconds")
    bucket = access.bucket(
        str(params["bucket"]),
        region=str(params.get("region", "")),
        endpoint=str(params.get("endpoint", "")),
    )
    if access.credentials is None:
        raise TerminalError(
            "the orchestrator has no S3 credentials to sign links with; it takes those of its "
            "environment (AWS_ACCESS_KEY_ID), of a profile, or of its machine's role"
        )
    with translated(bucket.place.shown(key)):
        link = bucket.client.generate_presigned_url(
            "get_object", Params={"Bucket": bucket.place.bucket, "Key": key}, ExpiresIn=seconds
        )
        return str(link)


@dataclass(slots=True)
class _Plain:
    """Each file as an object of its own."""

    bucket: Bucket
    key: str
    outputs: Path
    transfer: Transfer

    def run(self) -> dict[str, Any]:
        paths = packing.sorted_files(self.outputs)
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="upload") as pool:
            # A large file is left to be sent by itself, in parts: eight at once would not fit.
            futures = [pool.submit(self._put_small, path) for path in paths]
            try:
                large = [
                    path for future, path in zip(futures, paths, strict=True) if not future.result()
                ]
            finally:
                for future in futures:
                    future.cancel()
        for path in large:
            self._put_large(path)
        return {}

    def _put_small(self, path: str) -> bool:
        """False if it is not small."""
        import obstore

        self.transfer.check()
        key = f"{self.key}{path}"
        with self._open(key, path) as file:
            if os.fstat(file.fileno()).st_size > SMALL_BYTES:
                return False
            data = file.read()
            if is_plain_key(key):
                obstore.put(self.bucket.store, key, data, use_multipart=False)
            else:
                self.bucket.client.put_object(Bucket=self.bucket.place.bucket, Key=key, Body=data)
        self.transfer.done += len(data)
        return True

    def _put_large(self, path: str) -> None:
        key = f"{self.key}{path}"
        side = self.outputs.parent / f"upload-{hashlib.sha256(key.encode()).hexdigest()}.json"
        with self._open(key, path) as file:
            size = os.fstat(file.fileno()).st_size
            pieces = iter(lambda: file.read(packing.BLOCK_BYTES), b"")
            upload = _Upload(self.bucket, key, size, side, self.transfer)
            upload.run(self.transfer.counted(pieces))

    @contextlib.contextmanager
    def _open(self, key: str, path: str) -> Iterator[BinaryIO]:
        with (
            translated(self.bucket.place.shown(key), verb="write"),
            open(packing.open_output(self.outputs, path), "rb") as file,
        ):
            yield file


@dataclass(slots=True)
class _Archive:
    """All of them as one tar.gz."""

    bucket: Bucket
    key: str
    outputs: Path
    side: Path
    transfer: Transfer

    def run(self) -> dict[str, Any]:
        size = self.transfer.total or 0
        upload = _Upload(self.bucket, self.key, size, self.side, self.transfer)
        with translated(self.bucket.place.shown(self.key), verb="write"):
            return upload.run(packing.packed(self.outputs, counted=self.transfer.counted))


@dataclass(slots=True)
class _Upload:
    """One object from a stream, in parts if it is long. `size` is roughly how long.

    `side` remembers the id of an upload under way; it lies with the execution, and goes with it.
    """

    bucket: Bucket
    key: str
    size: int
    side: Path
    transfer: Transfer
    at_once: int = PARTS_AT_ONCE
    digest: Any = field(default_factory=hashlib.sha256)

    def run(self, pieces: Iterator[bytes]) -> dict[str, Any]:
        """Upload all of it; return what the location says besides: checksum, version."""
        parts = self._parts(pieces, max(PART_BYTES, self.size // PARTS_MAX + 1))
        # Only what is under way stays in memory: nothing else may refer to a part.
        begun = deque(itertools.islice(parts, 2))
        if len(begun) < 2:
            body = begun.popleft() if begun else bytearray()
            done = self.bucket.client.put_object(**self._target(), Body=body)
        else:
            done = self._multipart(begun, parts)
        self.side.unlink(missing_ok=True)
        found = {"checksumSha256": self.digest.hexdigest(), "versionId": done.get("VersionId", "")}
        return {name: value for name, value in found.items() if value and value != "null"}

    def _parts(self, pieces: Iterator[bytes], size: int) -> Iterator[bytearray]:
        """Each in a buffer of its own, made once in its full size: one that grows, or is cut
        from another, takes its memory twice."""
        part, filled = bytearray(size), 0
        for piece in pieces:
            self.transfer.check()
            self.digest.update(piece)
            rest = memoryview(piece)
            while len(rest) >= size - filled:
                room = size - filled
                part[filled:] = rest[:room]
                rest = rest[room:]
                yield part
                part, filled = bytearray(size), 0
            part[filled : filled + len(rest)] = rest
            filled += len(rest)
        if filled:
            del part[filled:]
            yield part

    def _multipart(self, begun: deque[bytearray], rest: Iterator[bytearray]) -> dict[str, Any]:
        parts = _chain(begun, rest)
        upload_id, there = self._resumed()
        if upload_id:
            return self._send_parts(upload_id, there, parts)
        upload_id = self.bucket.client.create_multipart_upload(**self._target())["UploadId"]
        try:
            _write_whole(self.side, json.dumps({"key": self.key, "uploadId": upload_id}))
        except OSError:
            # The disk is full, maybe of what is to be sent: then all of it in one try.
            return self._send_at_once(upload_id, parts)
        return self._send_parts(upload_id, there, parts)

    def _send_at_once(self, upload_id: str, parts: Iterator[bytearray]) -> dict[str, Any]:
        """An upload that nobody remembers: what does not come to its end is of no use."""
        try:
            return self._send_parts(upload_id, {}, parts)
        except BaseException:
            with contextlib.suppress(Exception):
                self.bucket.client.abort_multipart_upload(**self._target(), UploadId=upload_id)
            raise

    def _send_parts(
        self, upload_id: str, there: dict[int, str], parts: Iterator[bytearray]
    ) -> dict[str, Any]:
        etags: dict[int, str] = {}
        slots = threading.Semaphore(self.at_once)

        def send(number: int, data: bytearray) -> None:
            try:
                self.transfer.check()
                etags[number] = self.bucket.client.upload_part(
                    **self._target(), UploadId=upload_id, PartNumber=number, Body=data
                )["ETag"]
            finally:
                slots.release()

        with ThreadPoolExecutor(self.at_once, thread_name_prefix="upload") as pool:
            sent: set[Future[None]] = set()
            try:
                for number, data in enumerate(parts, start=1):
                    etag = there.get(number)
                    if (
                        etag is not None
                        and etag == hashlib.md5(data, usedforsecurity=False).hexdigest()
                    ):
                        etags[number] = f'"{etag}"'
                        continue
                    slots.acquire()
                    sent.add(pool.submit(send, number, data))
                    del data
                    done, sent = wait(sent, timeout=0, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                for future in sent:
                    future.result()
            finally:
                for future in sent:
                    future.cancel()
        listed = [{"PartNumber": n, "ETag": etags[n]} for n in sorted(etags)]
        done_upload: dict[str, Any] = self.bucket.client.complete_multipart_upload(
            **self._target(), UploadId=upload_id, MultipartUpload={"Parts": listed}
        )
        return done_upload

    def _resumed(self) -> tuple[str, dict[int, str]]:
        """An upload of an earlier try, and the MD5 of each part that is there."""
        from botocore.exceptions import ClientError

        try:
            kept = json.loads(self.side.read_text())
            if kept["key"] != self.key:
                return "", {}
            upload_id = str(kept["uploadId"])
        except (OSError, ValueError, KeyError, TypeError):
            return "", {}
        there: dict[int, str] = {}
        try:
            pages = self.bucket.client.get_paginator("list_parts").paginate(
                **self._target(), UploadId=upload_id
            )
            for page in pages:
                there |= {p["PartNumber"]: p["ETag"].strip('"') for p in page.get("Parts", ())}
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status in _BUSY:
                raise  # what is there is not given up for a server that has no time now
            return "", {}  # it was completed, aborted or forgotten, or cannot be listed: begin anew
        return upload_id, there

    def _target(self) -> dict[str, str]:
        return {"Bucket": self.bucket.place.bucket, "Key": self.key}


_BUSY = frozenset({429, 500, 502, 503, 504})


def _chain(begun: deque[bytearray], rest: Iterator[bytearray]) -> Iterator[bytearray]:
    while begun:
        yield begun.popleft()
    yield from rest


def _write_whole(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
