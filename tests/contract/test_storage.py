"""What every storage must do, and what the local and inline ones promise beyond it."""

import base64
import gzip
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bacalhau.archive import ArchiveLimits
from bacalhau.settings import AllowedPath
from bacalhau.storages import inline
from bacalhau.storages.inline import InlineStorage
from bacalhau.storages.local import LocalStorage
from bacalhau.storages.paths import PathRefusedError, PathRules, open_beneath
from bacalhau.storages.pins import MemoryPins
from bacalhau.storages.s3 import S3Storage
from bacalhau.storages.url import UrlStorage
from bacalhau.transfer.s3 import S3Access
from bacalhau_api.errors import TerminalError
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Storage
from tests.support.flushes import record_fsyncs
from tests.support.inputs import LOOPBACK, MIB, USE, input_cache, item
from tests.support.s3 import READER, S3Server
from tests.support.web import File, web_site


def data_url(data: bytes, kind: str = "text/plain") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def packed(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def files(directory: Path) -> list[Path]:
    return [p for p in directory.rglob("*") if p.is_file()]


# Every storage


@dataclass
class Rig:
    """A storage, an input that it can bring, what is in it, and one that it must refuse.

    `name` is the path of the content within what is fetched; empty if that is the content.
    """

    storage: Storage
    good: InputSource
    content: bytes
    refused: InputSource
    name: str = ""

    def read(self, fetched: Fetched) -> bytes:
        return (fetched.source / self.name).read_bytes()


@asynccontextmanager
async def local_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    (place / "data").mkdir()
    (place / "data" / "file").write_bytes(b"content")
    yield Rig(
        LocalStorage([AllowedPath(str(place / "data"))]),
        item("local", SourcePath=str(place / "data" / "file")),
        b"content",
        item("local", sourcePath="/etc/passwd"),
    )


@asynccontextmanager
async def inline_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    yield Rig(
        InlineStorage(),
        item("inline", URL=data_url(b"content")),
        b"content",
        item("inline", url="http://example.org/"),
    )


@asynccontextmanager
async def url_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    with web_site() as site:
        site.files["/a/file.csv"] = File(b"content", etag='"1"')
        async with input_cache(place / "cache") as cache:
            yield Rig(
                UrlStorage(cache, LOOPBACK, size_bytes_max=MIB),
                item("urlDownload", URL=site.url("/a/file.csv")),
                b"content",
                item("urlDownload", url="http://169.254.169.254/latest/meta-data"),
                "file.csv",
            )


@asynccontextmanager
async def s3_rig(place: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    server: S3Server = request.getfixturevalue("s3")
    with pytest.MonkeyPatch.context() as patch:
        server.put("a/file.csv", b"content")
        patch.setenv("AWS_ACCESS_KEY_ID", READER[0])
        patch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
        async with input_cache(place / "cache") as cache:
            yield Rig(
                S3Storage(cache, S3Access([server.url]), MemoryPins(), size_bytes_max=MIB),
                item("s3", Bucket="data", Key="a/file.csv", endpoint=server.url),
                b"content",
                item("s3", bucket="data", key="a/file.csv", endpoint="http://127.0.0.1:1"),
                "file.csv",
            )


RIGS: dict[str, Callable[[Path, pytest.FixtureRequest], AbstractAsyncContextManager[Rig]]] = {
    "local": local_rig,
    "inline": inline_rig,
    "urlDownload": url_rig,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path.resolve()


@pytest.fixture(params=RIGS)
async def rig(request: pytest.FixtureRequest, place: Path) -> AsyncIterator[Rig]:
    async with RIGS[request.param](place, request) as rig:
        yield rig


@pytest.fixture
def into(place: Path) -> Path:
    (place / "into").mkdir()
    return place / "into"


async def test_storage_is_well(rig: Rig) -> None:
    assert (await rig.storage.health()).is_available


async def test_good_input_is_admitted_and_fetched(rig: Rig, into: Path) -> None:
    assert await rig.storage.admit(rig.good.source) == ""
    fetched = await rig.storage.fetch(rig.good, into, USE)
    assert rig.read(fetched) == rig.content
    assert fetched.source == fetched.source.resolve()
    assert fetched.read_only
    assert fetched.size_bytes == len(rig.content)


async def test_fetch_may_be_repeated(rig: Rig, into: Path) -> None:
    first = await rig.storage.fetch(rig.good, into, USE)
    assert await rig.storage.fetch(rig.good, into, USE) == first
    assert rig.read(first) == rig.content
    assert rig.storage.progress(into) is None


async def test_refusal_says_why_and_holds_for_fetching(rig: Rig, into: Path) -> None:
    assert await rig.storage.admit(rig.refused.source)
    with pytest.raises(TerminalError):
        await rig.storage.fetch(rig.refused, into, USE)
    assert files(into) == []


async def test_unknown_parameter_is_named(rig: Rig) -> None:
    params = rig.good.source.params | {"sourcePaht": 1}
    reason = await rig.storage.admit(SpecConfig(type=rig.good.source.type, params=params))
    assert "params.sourcePaht: is not known" in reason


async def test_missing_parameter_is_named(rig: Rig) -> None:
    reason = await rig.storage.admit(SpecConfig(type=rig.good.source.type))
    assert "field required" in reason


# Local paths


async def refusal(storage: LocalStorage, into: Path, **params: object) -> str:
    """The reason why both admit and fetch refuse."""
    reason = await storage.admit(item("local", **params).source)
    with pytest.raises(PathRefusedError) as caught:
        await storage.fetch(item("local", **params), into, USE)
    assert caught.value.message == reason
    return reason


async def fetch(storage: LocalStorage, into: Path, **params: object) -> Fetched:
    assert await storage.admit(item("local", **params).source) == ""
    return await storage.fetch(item("local", **params), into, USE)


async def test_nothing_is_copied(place: Path, into: Path) -> None:
    (place / "data").mkdir()
    storage = LocalStorage([AllowedPath(str(place / "data"))])
    fetched = await fetch(storage, into, sourcePath=str(place / "data"))
    assert fetched == Fetched(source=place / "data", read_only=True)
    assert files(into) == []


async def test_without_patterns_it_is_not_available(into: Path) -> None:
    storage = LocalStorage([])
    assert not (await storage.health()).is_available
    assert "not among" in await refusal(storage, into, sourcePath="/usr")


@pytest.mark.parametrize(
    ("pattern", "path", "is_allowed"),
    [
        ("/data", "/data", True),
        ("/data", "/data/a/b", True),
        ("/data", "/data2", False),
        ("/data/", "/data", True),
        ("/data/*", "/data", False),
        ("/data/*", "/data/a", True),
        ("/data/*", "/data/a/b", True),
        ("/data/*.csv", "/data/x.csv", True),
        ("/data/*.csv", "/data/x.txt", False),
        ("/data/*.csv", "/data/sub/x.csv", False),
        ("/data/**", "/data", True),
        ("/data/**", "/data/a/b/c", True),
        ("/data/**/x", "/data/a/b/x", True),
        ("/data/**/x", "/data/x", True),
        ("/data/**/x", "/data/a/b/y", False),
        ("/data/?", "/data/a", True),
        ("/data/?", "/data/ab", False),
        ("/data/[ab]", "/data/b", True),
        ("/data/[!ab]", "/data/b", False),
        ("/data/[!ab]", "/data/c", True),
        ("/data/a.b", "/data/axb", False),
        ("/data/(a|b)", "/data/a", False),
    ],
)
def test_patterns(place: Path, pattern: str, path: str, is_allowed: bool) -> None:
    real = place / path.lstrip("/")
    real.mkdir(parents=True)
    rules = PathRules([AllowedPath(f"{place}{pattern}")])
    if is_allowed:
        assert rules.vet(str(real), writable=False).path == real
    else:
        with pytest.raises(PathRefusedError):
            rules.vet(str(real), writable=False)


@pytest.mark.parametrize(
    "path",
    [
        "{place}/data/../secret",
        "{place}/data/sub/../../secret",
        "{place}/data/link",
        "{place}/data/link/file",
        "{place}/data/file_link",
        "{place}/data/chain",
        "{place}/data/absent",
        "{place}/data/dangling",
        "{place}/data/loop",
        "{place}/secret",
        "relative",
        "",
        "{place}/data/\0",
        "/",
        "//{place}/secret",
        "{place}/data/./../secret",
    ],
)
async def test_ways_out_are_refused(place: Path, into: Path, path: str) -> None:
    (place / "secret").mkdir()
    (place / "secret" / "file").write_text("secret")
    (place / "data" / "sub").mkdir(parents=True)
    for name, target in {
        "link": "../secret",
        "file_link": str(place / "secret" / "file"),
        "chain": "link",
        "dangling": "nowhere",
        "loop": "loop",
    }.items():
        (place / "data" / name).symlink_to(target)
    storage = LocalStorage([AllowedPath(str(place / "data") + "/**", writable=True)])
    for params in ({}, {"readWrite": True}, {"readWrite": True, "createAs": "dir"}):
        given = {"sourcePath": path.format(place=place), **params}
        if path.endswith("absent") and "createAs" in params:
            continue  # that one may be made
        with pytest.raises(TerminalError):
            await storage.fetch(item("local", **given), into, USE)
    assert sorted(os.listdir(place / "secret")) == ["file"]
    assert not (place / "data" / "nowhere").exists()


async def test_links_that_stay_inside_are_fine(place: Path, into: Path) -> None:
    (place / "data" / "real").mkdir(parents=True)
    (place / "data" / "link").symlink_to("real")
    storage = LocalStorage([AllowedPath(str(place / "data"))])
    fetched = await fetch(storage, into, sourcePath=str(place / "data" / "link"))
    assert fetched.source == place / "data" / "real"


async def test_pattern_may_itself_lie_behind_a_link(place: Path, into: Path) -> None:
    (place / "disk" / "data").mkdir(parents=True)
    (place / "mnt").symlink_to("disk")
    storage = LocalStorage([AllowedPath(str(place / "mnt" / "*"))])
    fetched = await fetch(storage, into, sourcePath=str(place / "mnt" / "data"))
    assert fetched.source == place / "disk" / "data"


async def test_directory_swapped_for_a_link_between_the_looks(place: Path, into: Path) -> None:
    (place / "secret").mkdir()
    (place / "data" / "sub").mkdir(parents=True)
    storage = LocalStorage([AllowedPath(str(place / "data"))])
    source = item("local", sourcePath=str(place / "data" / "sub"))
    assert await storage.admit(source.source) == ""
    (place / "data" / "sub").rmdir()
    (place / "data" / "sub").symlink_to(place / "secret")
    with pytest.raises(PathRefusedError):
        await storage.fetch(source, into, USE)


def test_opening_follows_no_link(place: Path) -> None:
    (place / "real" / "sub").mkdir(parents=True)
    (place / "link").symlink_to("real")
    os.close(open_beneath(place / "real" / "sub"))
    for path in (place / "link", place / "link" / "sub"):
        with pytest.raises((PathRefusedError, NotADirectoryError)):
            open_beneath(path)


@pytest.mark.parametrize("path", ["{data}", "{data}/node", "{data}/node/x", "{parent}", "/"])
async def test_the_nodes_own_data_is_private(place: Path, into: Path, path: str) -> None:
    private = place / "bacalhau"
    (private / "node" / "x").mkdir(parents=True)
    storage = LocalStorage([AllowedPath("/**", writable=True)], private=[private])
    source = path.format(data=private, parent=place)
    assert "own data" in await refusal(storage, into, sourcePath=source)


async def test_writing_needs_the_operators_word_and_the_users(place: Path, into: Path) -> None:
    for name in ("ro", "rw"):
        (place / name).mkdir()
    allowed = [AllowedPath(str(place / "ro")), AllowedPath(str(place / "rw"), writable=True)]
    storage = LocalStorage(allowed)
    assert (await fetch(storage, into, sourcePath=str(place / "rw"))).read_only
    for word in (True, "true", "True"):
        fetched = await fetch(storage, into, sourcePath=str(place / "rw"), ReadWrite=word)
        assert not fetched.read_only
    assert (await fetch(storage, into, sourcePath=str(place / "ro"), readWrite="false")).read_only
    reason = await refusal(storage, into, sourcePath=str(place / "ro"), readWrite=True)
    assert "may only be read" in reason


async def test_making_what_is_missing(place: Path, into: Path) -> None:
    (place / "rw").mkdir()
    storage = LocalStorage([AllowedPath(str(place / "rw"), writable=True)])
    path = str(place / "rw" / "a" / "b")
    assert "does not exist" in await refusal(storage, into, sourcePath=path, readWrite=True)
    assert not (place / "rw" / "a").exists()
    made = await fetch(storage, into, sourcePath=path, readWrite=True, CreateAs="DIR")
    assert made.source.is_dir()
    made = await fetch(storage, into, sourcePath=path + "/f", readWrite=True, createAs="file")
    assert made.source.read_bytes() == b""
    made.source.write_text("kept")
    again = await fetch(storage, into, sourcePath=path + "/f", readWrite=True, createAs="file")
    assert again.source.read_text() == "kept"


async def test_nothing_is_made_where_only_reading_is_allowed(place: Path, into: Path) -> None:
    (place / "ro").mkdir()
    storage = LocalStorage([AllowedPath(str(place / "ro"))])
    path = str(place / "ro" / "new")
    reason = await refusal(storage, into, sourcePath=path, readWrite=True, createAs="dir")
    assert "may only be read" in reason
    assert "needs readWrite" in await refusal(storage, into, sourcePath=path, createAs="dir")
    assert list((place / "ro").iterdir()) == []


async def test_only_files_and_directories(place: Path, into: Path) -> None:
    (place / "data").mkdir()
    os.mkfifo(place / "data" / "pipe")
    storage = LocalStorage([AllowedPath(str(place / "data"))])
    with pytest.raises(PathRefusedError, match="neither a file nor a directory"):
        await storage.fetch(item("local", sourcePath=str(place / "data" / "pipe")), into, USE)


# Inline data


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:,hello%20world", b"hello world"),
        ("data:text/plain,a+b", b"a+b"),
        ("data:text/plain;charset=utf-8;base64,aGVsbG8=", b"hello"),
        ("DATA:;BASE64,aGVs%0AbG8%3D", b"hello"),
        ("data:application/wasm;base64,AGFzbQ==", b"\0asm"),
        ("data:,", b""),
        ("data:,a,b", b"a,b"),
    ],
)
async def test_data_urls(into: Path, url: str, expected: bytes) -> None:
    storage = InlineStorage()
    assert await storage.admit(item("inline", url=url).source) == ""
    fetched = await storage.fetch(item("inline", url=url), into, USE)
    assert fetched.source.read_bytes() == expected


async def test_inline_data_are_on_the_disk_before_they_count(
    into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power failure nobody fetches them again."""
    flushed = record_fsyncs(monkeypatch)
    monkeypatch.setattr(inline, "sync_file_system", flushed.append)
    got = await InlineStorage().fetch(item("inline", url=data_url(b"1")), into, USE)
    assert flushed == [got.source, got.source.parent]
    flushed.clear()
    url = data_url(packed({"data": b"2"}), "application/gzip")
    await InlineStorage().fetch(item("inline", url=url), into, USE)
    assert flushed == [into]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/", "must be a data URL"),
        ("data:text/plain", "must be a data URL"),
        ("hello", "must be a data URL"),
        ("data:;base64,a", "base64"),
        ("data:;base64,!!!!", "base64"),
        ("data:," + "x" * 2000, "more than the 1000 bytes allowed"),
        (data_url(bytes(1001)), "more than the 1000 bytes allowed"),
    ],
)
async def test_wrong_data_urls(into: Path, url: str, words: str) -> None:
    storage = InlineStorage(size_bytes_max=1000)
    assert words in await storage.admit(item("inline", url=url).source)
    with pytest.raises(TerminalError, match=words):
        await storage.fetch(item("inline", url=url), into, USE)


async def test_archive_becomes_a_directory(into: Path) -> None:
    url = data_url(packed({"main.wasm": b"1", "sub/data": b"22"}), "application/gzip")
    fetched = await InlineStorage().fetch(item("inline", url=url), into, USE)
    assert fetched.source.is_dir()
    assert fetched.size_bytes == 3
    assert (fetched.source / "sub" / "data").read_bytes() == b"22"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (packed({"../../escape": b"x"}), "climbs"),
        (packed({"/etc/escape": b"x"}), "absolute"),
        (packed({"big": bytes(2000)}), "more than 1000 bytes"),
        (gzip.compress(b"no tar" * 100), "not a tar archive"),
        (b"no gzip", "ends early"),
    ],
)
async def test_hostile_archives(place: Path, into: Path, data: bytes, words: str) -> None:
    storage = InlineStorage(limits=ArchiveLimits(size_bytes_max=1000))
    with pytest.raises(TerminalError, match=words):
        await storage.fetch(item("inline", url=data_url(data, "application/gzip")), into, USE)
    assert not (place / "escape").exists()
    assert files(into) == []
