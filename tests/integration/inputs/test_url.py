"""urlDownload against a real server that misbehaves."""

import asyncio
import hashlib
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from bacalhau.storages.cache import InputCache
from bacalhau.storages.url import UrlStorage
from bacalhau.transfer.addresses import AddressPolicy, AddressRefusedError, AllowedAddress
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_controllers.runner.ports import Fetched
from tests.support.inputs import LOOPBACK, MIB, USE, input_cache, item, tree
from tests.support.web import File, Site, web_site


@pytest.fixture
def site() -> Iterator[Site]:
    with web_site() as site:
        yield site


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[InputCache]:
    async with input_cache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def storage(cache: InputCache) -> UrlStorage:
    return UrlStorage(cache, LOOPBACK, size_bytes_max=32 * MIB)


async def fetch(storage: UrlStorage, into: Path, url: str, **params: object) -> Fetched:
    os.makedirs(into, exist_ok=True)
    return await storage.fetch(item("urlDownload", url=url, **params), into, USE)


# Where it connects


async def test_private_addresses_are_refused_by_default(
    site: Site, cache: InputCache, tmp_path: Path
) -> None:
    site.files["/x.csv"] = File(b"x")
    storage = UrlStorage(cache, AddressPolicy(), size_bytes_max=MIB)
    assert "loopback" in await storage.admit(item("urlDownload", url=site.url("/x.csv")).source)
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(AddressRefusedError, match="loopback address"):
            await fetch(storage, tmp_path / "in", site.url("/x.csv", host))
    assert site.requests == []


async def test_each_redirect_is_vetted_too(site: Site, cache: InputCache, tmp_path: Path) -> None:
    with web_site() as inner:
        inner.files["/secret.txt"] = File(b"secret")
        site.files["/x.csv"] = File(status=302, location=inner.url("/secret.txt"))
        policy = AddressPolicy([AllowedAddress.parse(f"127.0.0.1:{site.port}")])
        storage = UrlStorage(cache, policy, size_bytes_max=MIB)
        with pytest.raises(AddressRefusedError, match=str(inner.port)):
            await fetch(storage, tmp_path / "in", site.url("/x.csv"))
        assert inner.requests == []
        site.files["/x.csv"].location = "http://169.254.169.254/latest/meta-data/"
        with pytest.raises(AddressRefusedError, match="metadata"):
            await fetch(storage, tmp_path / "in", site.url("/x.csv"))


async def test_the_address_vetted_is_the_one_connected_to(
    site: Site, cache: InputCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that leads elsewhere the second time it is looked up (DNS rebinding)."""
    site.files["/x.csv"] = File(b"secret")
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        answer = "192.0.2.1" if len(asked) == 1 else "127.0.0.1"
        return real(answer, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    policy = AddressPolicy([AllowedAddress.parse("192.0.2.1")])
    connected: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    storage = UrlStorage(cache, policy, size_bytes_max=MIB)
    with pytest.raises(UnavailableError, match="refused"):
        await fetch(storage, tmp_path / "in", site.url("/x.csv", "rebinding.example"))
    assert asked == ["rebinding.example"]
    assert connected == ["192.0.2.1"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1/x.csv", "must be a URL such as"),
        ("file:///etc/passwd", "must be a URL such as"),
        ("http://127.0.0.1/", "file name"),
        ("http://127.0.0.1/a/..", "file name"),
        ("http://127.0.0.1/%2e%2e", "file name"),
        ("http://127.0.0.1/a%2Fb%00c", "file name"),
        ("http://user:hunter2@127.0.0.1/x.csv", "user name or password"),
        ("http://127.0.0.1:99999/x.csv", "not a valid URL"),
        ("http://169.254.169.254/x.csv", "metadata"),
        ("http://[::ffff:169.254.169.254]/x.csv", "metadata"),
    ],
)
async def test_urls_that_are_refused(
    storage: UrlStorage, tmp_path: Path, url: str, words: str
) -> None:
    reason = await storage.admit(item("urlDownload", url=url).source)
    assert words in reason
    assert "hunter2" not in reason
    with pytest.raises(TerminalError):
        await fetch(storage, tmp_path / "in", url)
    assert tree(tmp_path / "in") == {}


# Redirects, sizes, checksums


async def test_redirects_are_followed_and_bounded(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    site.files["/a.csv"] = File(status=301, location="/b.csv")
    site.files["/b.csv"] = File(status=307, location=site.url("/c.csv", "localhost"))
    site.files["/c.csv"] = File(b"content")
    fetched = await fetch(storage, tmp_path / "in", site.url("/a.csv"))
    assert tree(fetched.source) == {"a.csv": b"content"}
    site.files["/c.csv"] = File(status=302, location="/a.csv")
    with pytest.raises(TerminalError, match="redirects more than 5 times"):
        await fetch(storage, tmp_path / "in2", site.url("/a.csv"))


@pytest.mark.parametrize("is_sized", [True, False])
async def test_size_cap(site: Site, cache: InputCache, tmp_path: Path, is_sized: bool) -> None:
    site.files["/big.bin"] = File(bytes(2 * MIB), is_sized=is_sized)
    storage = UrlStorage(cache, LOOPBACK, size_bytes_max=MIB)
    with pytest.raises(TerminalError, match="--input-max-size") as caught:
        await fetch(storage, tmp_path / "in", site.url("/big.bin"))
    assert caught.value.reason == "InputTooLarge"
    assert tree(tmp_path / "in") == {}


@pytest.mark.parametrize("is_sized", [True, False])
async def test_checksums(site: Site, storage: UrlStorage, tmp_path: Path, is_sized: bool) -> None:
    data = b"content" * 100
    digest = hashlib.sha256(data).hexdigest()
    site.files["/x.csv"] = File(data, is_sized=is_sized)
    url = site.url("/x.csv")
    with pytest.raises(TerminalError, match="SHA-256") as caught:
        await fetch(storage, tmp_path / "a", url, checksumSha256="0" * 64)
    assert caught.value.reason == "ChecksumMismatch"
    good = await fetch(storage, tmp_path / "b", url, checksumSha256=digest.upper())
    assert tree(good.source) == {"x.csv": data}
    count = len(site.requests)
    await fetch(storage, tmp_path / "c", url, checksumSha256=digest)
    assert len(site.requests) == count, "what is here by its digest is not asked for"
    wrong = item("urlDownload", url=url, checksumSha256="abc")
    assert "64 hex digits" in await storage.admit(wrong.source)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, TerminalError), (403, TerminalError), (401, TerminalError), (410, TerminalError),
        (500, TransientError), (503, TransientError), (429, TransientError), (408, TransientError),
    ],
)  # fmt: skip
async def test_statuses(
    site: Site, storage: UrlStorage, tmp_path: Path, status: int, error: type[Exception]
) -> None:
    site.files["/x.csv"] = File(b"", status=status)
    with pytest.raises(error, match=str(status)):
        await fetch(storage, tmp_path / "in", site.url("/x.csv"))


async def test_secrets_in_a_query_are_not_told(
    site: Site, storage: UrlStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    site.files["/x.csv"] = File(b"", status=403)
    with pytest.raises(TerminalError) as caught:
        await fetch(storage, tmp_path / "in", site.url("/x.csv?X-Signature=hunter2"))
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in caplog.text


# Lines that break


async def test_a_broken_line_is_resumed(site: Site, storage: UrlStorage, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    site.files["/x.bin"] = File(data, etag='"v1"', cuts=[300_000, 400_000])
    fetched = await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    assert tree(fetched.source) == {"x.bin": data}
    ranges = [request.headers.get("Range") for request in site.requests]
    assert ranges == [None, "bytes=300000-", "bytes=700000-"]
    assert sum(request.sent for request in site.requests) == len(data)


async def test_resume_goes_on_after_the_agent_was_killed(site: Site, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    file = site.files["/x.bin"] = File(data, etag='"v1"', cuts=[300_000])
    url = site.url("/x.bin")
    async with input_cache(tmp_path / "cache") as cache:
        storage = UrlStorage(cache, LOOPBACK, size_bytes_max=MIB)
        file.cuts = [300_000, 0]
        with pytest.raises(UnavailableError, match="broke off"):
            await fetch(storage, tmp_path / "a", url)
    async with input_cache(tmp_path / "cache") as cache:
        storage = UrlStorage(cache, LOOPBACK, size_bytes_max=MIB)
        fetched = await fetch(storage, tmp_path / "b", url)
    assert tree(fetched.source) == {"x.bin": data}
    assert site.requests[-1].headers["Range"] == "bytes=300000-"


async def test_a_file_that_changed_meanwhile_is_not_sewn_together(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    file = site.files["/x.bin"] = File(b"a" * 1000, etag='"v1"', cuts=[400, 0])
    with pytest.raises(UnavailableError):
        await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    file.data, file.etag = b"b" * 1000, '"v2"'
    fetched = await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    assert tree(fetched.source) == {"x.bin": b"b" * 1000}


OLD = "Wed, 04 Mar 2020 05:06:07 GMT"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param({"etag": '"v1"'}, {"etag": '"v2"'}, id="by its tag"),
        pytest.param(
            {"last_modified": OLD}, {"last_modified": formatdate(usegmt=True)}, id="by its date"
        ),
    ],
)
async def test_a_server_that_ignores_the_condition_of_a_range(
    site: Site, storage: UrlStorage, tmp_path: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    site.files["/x.bin"] = File(b"a" * 1000, cuts=[400, 0], ignores_conditions=True, **one)
    with pytest.raises(UnavailableError):
        await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    site.files["/x.bin"] = File(b"b" * 1000, ignores_conditions=True, **two)
    with pytest.raises(UnavailableError, match="has changed meanwhile"):
        await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    fetched = await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    assert tree(fetched.source) == {"x.bin": b"b" * 1000}


async def test_a_date_of_just_now_may_stand_for_two_versions(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    now = formatdate(usegmt=True)
    file = site.files["/x.bin"] = File(b"a" * 1000, last_modified=now, cuts=[400, 0])
    with pytest.raises(UnavailableError):
        await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    file.data = b"b" * 1000  # within the second
    fetched = await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    assert tree(fetched.source) == {"x.bin": b"b" * 1000}
    file.data = b"c" * 1000
    again = await fetch(storage, tmp_path / "again", site.url("/x.bin"))
    assert tree(again.source) == {"x.bin": b"c" * 1000}


async def test_a_date_long_past_is_gone_by(site: Site, storage: UrlStorage, tmp_path: Path) -> None:
    site.files["/x.bin"] = File(b"a" * 1000, last_modified=OLD, cuts=[400])
    for place in ("in", "again"):
        fetched = await fetch(storage, tmp_path / place, site.url("/x.bin"))
        assert tree(fetched.source) == {"x.bin": b"a" * 1000}
    assert [request.sent for request in site.requests] == [400, 600, 0]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
async def test_without_a_strong_validator_it_begins_anew(
    site: Site, storage: UrlStorage, tmp_path: Path, etag: str
) -> None:
    file = site.files["/x.bin"] = File(b"a" * 1000, etag=etag, cuts=[400])
    url = site.url("/x.bin")
    fetched = await fetch(storage, tmp_path / "in", url)
    assert tree(fetched.source) == {"x.bin": file.data}
    assert all("Range" not in request.headers for request in site.requests)


async def test_a_server_that_ignores_ranges(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    data = bytes(range(256)) * 100
    site.files["/x.bin"] = File(data, etag='"v1"', cuts=[400], ignores_ranges=True)
    fetched = await fetch(storage, tmp_path / "in", site.url("/x.bin"))
    assert tree(fetched.source) == {"x.bin": data}


# Sharing


async def test_the_server_is_asked_whether_it_has_changed(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    file = site.files["/x.csv"] = File(b"one", etag='"v1"')
    url = site.url("/x.csv")
    first = await fetch(storage, tmp_path / "a", url)
    second = await fetch(storage, tmp_path / "b", url)
    assert [request.sent for request in site.requests] == [3, 0]
    assert (second.source / "x.csv").samefile(first.source / "x.csv"), "kept once on disk"
    file.data, file.etag = b"two", '"v2"'
    third = await fetch(storage, tmp_path / "c", url)
    assert tree(third.source) == {"x.csv": b"two"}
    assert tree(first.source) == {"x.csv": b"one"}, "who runs keeps what it began with"


async def test_wishes_at_one_time_wait_for_one_download(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    site.files["/x.bin"] = File(bytes(MIB), gate=threading.Event())
    file = site.files["/x.bin"]
    assert file.gate is not None
    url = site.url("/x.bin")
    wishes = [asyncio.create_task(fetch(storage, tmp_path / str(n), url)) for n in range(8)]
    await asyncio.to_thread(file.halfway.wait, 30)
    progress = None
    while progress is None or not progress.done_bytes:
        await asyncio.sleep(0.01)
        progress = storage.progress(tmp_path / "3")
    assert progress.total_bytes == MIB
    assert 0 < progress.done_bytes < MIB
    wishes[0].cancel()  # one that goes does not end it for the others
    file.gate.set()
    done = await asyncio.gather(*wishes, return_exceptions=True)
    assert isinstance(done[0], asyncio.CancelledError)
    assert all(isinstance(one, Fetched) for one in done[1:])
    assert len(site.requests) == 1
    assert storage.progress(tmp_path / "3") is None


async def test_when_nobody_waits_any_more_it_ends(
    site: Site, storage: UrlStorage, tmp_path: Path
) -> None:
    gate = threading.Event()
    file = site.files["/x.bin"] = File(bytes(4 * MIB), etag='"1"', gate=gate)
    wish = asyncio.create_task(fetch(storage, tmp_path / "a", site.url("/x.bin")))
    await asyncio.to_thread(file.halfway.wait, 30)
    wish.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(wish, 20)
    # The gate is still shut: it was the cancelling that woke the thread, not the server.
    assert not gate.is_set()
    file.gate = None
    fetched = await fetch(storage, tmp_path / "b", site.url("/x.bin"))
    assert fetched.size_bytes == 4 * MIB
