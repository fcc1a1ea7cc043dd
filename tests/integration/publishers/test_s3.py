"""The S3 publisher against a real server."""

import asyncio
import io
import json
import logging
import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse, HTTPHeaders
from botocore.exceptions import EndpointConnectionError
from urllib3 import HTTPResponse

from bacalhau.publishers.s3 import S3Publisher, presigned_link
from bacalhau.transfer.s3 import Bucket, S3Access
from bacalhau.transfer.threads import TransferThreads
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_api.v1.execution import Publication
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.ports import Progress
from tests.support.outputs import make_outputs, publication_to, read_archive
from tests.support.s3 import ADMIN, READER, S3Server

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])


@pytest.fixture
def threads() -> Iterator[TransferThreads]:
    threads = TransferThreads()
    yield threads
    threads.close()


@pytest.fixture
def publisher(s3: S3Server, threads: TransferThreads) -> S3Publisher:
    return S3Publisher(S3Access([s3.url]), threads)


def target(s3: S3Server, key: str, **params: object) -> Publication:
    given = {"bucket": "data", "key": key, "endpoint": s3.url, **params}
    return publication_to(SpecConfig(type="s3", params=given))


@pytest.mark.parametrize(
    ("key", "encoding", "expected"),
    [
        ("out/{jobID}/{partition}", "gzip", "out/job/2.tar.gz"),
        ("{date}/{time}-{nodeID}.tgz", "gzip", "20260304/050607-edge-1.tgz"),
        ("{executionID}.tar.gz", "gzip", "job-0123abcd-1-2-0.tar.gz"),
        ("out/{partition}", "plain", "out/2/"),
        ("out/", "plain", "out/"),
    ],
)
async def test_keys(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, key: str, encoding: str, expected: str
) -> None:
    outputs = make_outputs(tmp_path / "outputs")
    location = await publisher.publish(target(s3, key, encoding=encoding), outputs)
    assert location.params["key"] == expected
    names = ["exitCode", "stderr", "stdout", "tables/a.csv"]
    if encoding == "plain":
        assert s3.keys() == [expected + name for name in names]
        assert s3.get(expected + "tables/a.csv") == b"a,b\n1,2\n"
    else:
        assert s3.keys() == [expected]
        assert list(read_archive(s3.get(expected))) == names


async def test_partitions_do_not_overwrite_each_other(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path
) -> None:
    outputs = make_outputs(tmp_path / "outputs")
    given = {"bucket": "data", "key": "r/{partition}", "endpoint": s3.url}
    for partition in range(3):
        config = SpecConfig(type="s3", params=given)
        await publisher.publish(publication_to(config, partition=partition), outputs)
    assert s3.keys() == [f"r/{n}.tar.gz" for n in range(3)]


async def test_links_do_not_lead_out(publisher: S3Publisher, s3: S3Server, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path / "outputs")
    (tmp_path / "secret").write_text("secret")
    (outputs / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(outputs / "pipe")
    await publisher.publish(target(s3, "a"), outputs)
    assert b"secret" not in b"".join(read_archive(s3.get("a.tar.gz")).values())
    await publisher.publish(target(s3, "b/", encoding="plain"), outputs)
    assert "b/link" not in s3.keys("b/")


async def test_a_long_upload_goes_in_parts_and_resumes(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(29 * MIB)  # does not get shorter by packing
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": data})
    publication = target(s3, "big")
    sent: list[int] = []
    _count_parts(monkeypatch, sent, fail_at=3)
    with pytest.raises(TransientError, match="could not be written"):
        await publisher.publish(publication, outputs)
    assert s3.keys() == [], "nothing is seen before all of it is there"
    before = set(sent)
    sent.clear()
    _count_parts(monkeypatch, sent, fail_at=0)
    location = await publisher.publish(publication, outputs)
    assert read_archive(s3.get("big.tar.gz"))["big.bin"] == data
    assert 0 < len(sent) < 4
    assert not before & set(sent), "a part that is there is not sent again"
    assert os.listdir(tmp_path) == ["outputs"]
    assert location.params["checksumSha256"]
    assert s3.admin.list_multipart_uploads(Bucket="data").get("Uploads", []) == []


async def test_a_server_that_is_busy_costs_no_part_that_is_there(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(20 * MIB)
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": data})
    sent: list[int] = []
    _count_parts(monkeypatch, sent, fail_at=3)
    with pytest.raises(TransientError):
        await publisher.publish(target(s3, "big"), outputs)
    before = set(sent)
    sent.clear()
    _count_parts(monkeypatch, sent, fail_at=0)

    def busy(**_: object) -> AWSResponse:
        body = io.BytesIO(b"<Error><Code>SlowDown</Code></Error>")
        return AWSResponse(s3.url, 503, HTTPHeaders(), HTTPResponse(body, preload_content=False))

    events = publisher._access.bucket("data", endpoint=s3.url).client.meta.events
    events.register("before-send.s3.ListParts", busy)
    with pytest.raises(TransientError, match="SlowDown"):
        await publisher.publish(target(s3, "big"), outputs)
    assert sent == []
    events.unregister("before-send.s3.ListParts", busy)
    await publisher.publish(target(s3, "big"), outputs)
    assert not before & set(sent)
    assert read_archive(s3.get("big.tar.gz"))["big.bin"] == data


async def test_outputs_that_changed_are_not_mixed_with_earlier_parts(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": os.urandom(20 * MIB)})
    publication = target(s3, "big")
    sent: list[int] = []
    _count_parts(monkeypatch, sent, fail_at=2)
    with pytest.raises(TransientError):
        await publisher.publish(publication, outputs)
    data = os.urandom(20 * MIB)
    (outputs / "big.bin").write_bytes(data)
    _count_parts(monkeypatch, sent, fail_at=0)
    await publisher.publish(publication, outputs)
    assert read_archive(s3.get("big.tar.gz"))["big.bin"] == data


async def test_an_upload_that_the_server_forgot_begins_anew(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(20 * MIB)
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": data})
    sent: list[int] = []
    _count_parts(monkeypatch, sent, fail_at=2)
    with pytest.raises(TransientError):
        await publisher.publish(target(s3, "big"), outputs)
    s3.clear()
    _count_parts(monkeypatch, sent, fail_at=0)
    await publisher.publish(target(s3, "big"), outputs)
    assert read_archive(s3.get("big.tar.gz"))["big.bin"] == data


async def test_a_full_disk_does_not_keep_results_from_being_delivered(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(20 * MIB)
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": data})
    (tmp_path / f"upload-{target(s3, 'big').metadata.uid}.new").symlink_to("/dev/full")
    sent: list[int] = []
    _count_parts(monkeypatch, sent, fail_at=2)
    with pytest.raises(TransientError, match="could not be written"):
        await publisher.publish(target(s3, "big"), outputs)
    assert s3.admin.list_multipart_uploads(Bucket="data").get("Uploads", []) == []
    _count_parts(monkeypatch, sent, fail_at=0)
    await publisher.publish(target(s3, "big"), outputs)
    assert read_archive(s3.get("big.tar.gz"))["big.bin"] == data


async def test_large_plain_files(publisher: S3Publisher, s3: S3Server, tmp_path: Path) -> None:
    data = os.urandom(18 * MIB)
    outputs = make_outputs(tmp_path / "outputs", {"x/big.bin": data})
    await publisher.publish(target(s3, "p", encoding="plain"), outputs)
    assert s3.get("p/x/big.bin") == data


class Counting:
    """A client that notes the numbers of parts it sent, and breaks before part `fail_at`."""

    def __init__(self, client: Any, sent: list[int], fail_at: int) -> None:
        self._client = client
        self._sent = sent
        self._fail_at = fail_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def upload_part(self, **given: Any) -> Any:
        if given["PartNumber"] == self._fail_at:
            raise EndpointConnectionError(endpoint_url="the line")
        answer = self._client.upload_part(**given)
        self._sent.append(given["PartNumber"])
        return answer


_CLIENT = Bucket.client.fget  # type: ignore[attr-defined]


def _count_parts(monkeypatch: pytest.MonkeyPatch, sent: list[int], *, fail_at: int) -> None:
    """Have the parts that are sent noted, and the line broken before part `fail_at`."""
    counting = property(lambda self: Counting(_CLIENT(self), sent, fail_at))
    monkeypatch.setattr(Bucket, "client", counting)


async def test_rights(
    s3: S3Server, threads: TransferThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG, logger="bacalhau")
    outputs = make_outputs(tmp_path / "outputs")
    for keys in (READER, (ADMIN[0], "wrong-hunter2")):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])
        publisher = S3Publisher(S3Access([s3.url]), threads)
        for encoding in ("gzip", "plain"):
            with pytest.raises(TerminalError, match="credentials") as caught:
                await publisher.publish(target(s3, "x", encoding=encoding), outputs)
            assert "hunter2" not in str(caught.value) + caplog.text
    assert s3.keys() == []


class Role(BaseHTTPRequestHandler):
    """What a cloud's machine learns of its role."""

    def do_PUT(self) -> None:
        """A token."""
        self._answer("token")

    def do_GET(self) -> None:
        """The role's name, and its keys."""
        if self.path.endswith("/security-credentials/"):
            self._answer("role")
            return
        keys = {
            "Code": "Success", "AccessKeyId": ADMIN[0], "SecretAccessKey": ADMIN[1],
            "Token": "", "Expiration": "2099-01-01T00:00:00Z",
        }  # fmt: skip
        self._answer(json.dumps(keys))

    def _answer(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


async def test_a_role_that_comes_later_than_the_agent(
    s3: S3Server, threads: TransferThreads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a boot in which the network was not up yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setattr("bacalhau.transfer.s3.CREDENTIALS_SECONDS", 0.0)
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": os.urandom(2 * MIB)})
    publisher = S3Publisher(S3Access([s3.url]), threads)
    for encoding in ("gzip", "plain"):
        with pytest.raises(TransientError, match="credentials"):
            await publisher.publish(target(s3, "late", encoding=encoding), outputs)
    with HTTPServer(("127.0.0.1", port), Role) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            for encoding in ("gzip", "plain"):
                await publisher.publish(target(s3, "late", encoding=encoding), outputs)
        finally:
            server.shutdown()
            serving.join()
    assert s3.get("late/stdout") == b"hello\n"
    assert s3.get("late.tar.gz")


async def test_what_cannot_work(
    s3: S3Server, threads: TransferThreads, publisher: S3Publisher, tmp_path: Path
) -> None:
    outputs = make_outputs(tmp_path / "outputs")
    with pytest.raises(TerminalError, match="placeholder"):
        await publisher.publish(target(s3, "{jobId}"), outputs)
    closed = S3Publisher(S3Access([]), threads)
    with pytest.raises(TerminalError, match="--s3-endpoint"):
        await closed.publish(target(s3, "x"), outputs)


async def test_presigned_links(publisher: S3Publisher, s3: S3Server, tmp_path: Path) -> None:
    outputs = make_outputs(tmp_path / "outputs")
    location = await publisher.publish(target(s3, "x"), outputs)
    assert "Signature" not in str(location), "links are not part of what is stored"
    access = S3Access([s3.url])
    link = await asyncio.to_thread(presigned_link, access, location, 60)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link
    assert ADMIN[1] not in link

    def read() -> bytes:
        with urllib.request.urlopen(link, timeout=10) as answer:
            data: bytes = answer.read()
            return data

    assert read_archive(await asyncio.to_thread(read))["stdout"] == b"hello\n"
    with pytest.raises(TerminalError, match="from 1 to"):
        presigned_link(access, location, 8 * 86400)
    with pytest.raises(TerminalError, match="one archive"):
        presigned_link(access, SpecConfig(type="s3", params={"bucket": "b", "key": "x/"}), 60)


@pytest.mark.parametrize("encoding", ["gzip", "plain"])
async def test_how_far_an_upload_is(
    publisher: S3Publisher, s3: S3Server, tmp_path: Path, encoding: str
) -> None:
    outputs = make_outputs(tmp_path / "outputs", {"big.bin": os.urandom(16 * MIB)})
    publication = target(s3, "far", encoding=encoding)
    uid = publication.metadata.uid
    assert publisher.progress(uid) is None
    seen: list[Progress] = []
    upload = asyncio.create_task(publisher.publish(publication, outputs))
    while not upload.done():
        if (progress := publisher.progress(uid)) is not None and progress.total_bytes:
            seen.append(progress)
        await asyncio.sleep(0.001)
    await upload
    size = 16 * MIB + 6 + 1 + 8
    assert {progress.total_bytes for progress in seen} == {size}
    assert [p.done_bytes for p in seen] == sorted(p.done_bytes for p in seen)
    assert 0 < seen[-1].done_bytes <= size
    assert publisher.progress(uid) is None
    # Once more, by a publisher that is told to give up.
    gone = asyncio.create_task(publisher.publish(target(s3, "gone", encoding=encoding), outputs))
    await asyncio.sleep(0)
    assert publisher.progress(uid) is not None
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert publisher.progress(uid) is None
