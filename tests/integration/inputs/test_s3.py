"""S3 inputs against a real server, with keys that may do only some things."""

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bacalhau.storages.cache import InputCache
from bacalhau.storages.pins import MemoryPins
from bacalhau.storages.s3 import PART_BYTES, S3Storage
from bacalhau.transfer.s3 import S3Access
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.runner.ports import Fetched, Use
from tests.support.inputs import MIB, USE, input_cache, item, tree
from tests.support.s3 import ADMIN, READER, S3Server


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, READER)


def as_user(monkeypatch: pytest.MonkeyPatch, keys: tuple[str, str] | None) -> None:
    """The environment of a node with these credentials, and no others to be found."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    if keys is not None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[InputCache]:
    async with input_cache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def pins() -> MemoryPins:
    return MemoryPins()


@pytest.fixture
def storage(cache: InputCache, s3: S3Server, pins: MemoryPins) -> S3Storage:
    return S3Storage(cache, S3Access([s3.url]), pins, size_bytes_max=48 * MIB)


async def fetch(
    storage: S3Storage, s3: S3Server, into: Path, key: str, use: Use = USE, **params: object
) -> Fetched:
    os.makedirs(into, exist_ok=True)
    given = {"bucket": "data", "key": key, "endpoint": s3.url, **params}
    return await storage.fetch(item("s3", **given), into, use)


async def test_one_object(storage: S3Storage, s3: S3Server, tmp_path: Path) -> None:
    s3.put("a/b/file.csv", b"content")
    fetched = await fetch(storage, s3, tmp_path / "in", "a/b/file.csv")
    assert tree(fetched.source) == {"file.csv": b"content"}
    assert fetched.read_only
    assert fetched.size_bytes == 7


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/", {"b.csv", "sub/c.csv"}),
        ("a/*", {"b.csv", "sub/c.csv"}),
        ("", {"a/b.csv", "a/sub/c.csv", "other"}),
        ("a/**/c.csv", {"sub/c.csv"}),
    ],
)
async def test_prefixes_and_patterns(
    storage: S3Storage, s3: S3Server, tmp_path: Path, key: str, expected: set[str]
) -> None:
    for name in ("a/", "a/b.csv", "a/sub/c.csv", "other"):
        s3.put(name, b"" if name.endswith("/") else name.encode())
    fetched = await fetch(storage, s3, tmp_path / "in", key)
    assert set(tree(fetched.source)) == expected


@pytest.mark.parametrize(
    "name", ["a b", "a%20b", "ü", "e\u0301", "a#b", "a+b", "a?b", "a{b}", "a=b&c", "a:b", "'\"<>"]
)
async def test_odd_keys(storage: S3Storage, s3: S3Server, tmp_path: Path, name: str) -> None:
    s3.put(f"k/{name}", name.encode())
    s3.put("k/plain", b"plain")
    fetched = await fetch(storage, s3, tmp_path / "in", "k/")
    assert tree(fetched.source) == {name: name.encode(), "plain": b"plain"}


async def test_many_small_objects(storage: S3Storage, s3: S3Server, tmp_path: Path) -> None:
    expected = {f"{n % 10}/{n}": str(n).encode() for n in range(1100)}  # two pages of a listing
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3.put(f"many/{name}", expected[name]), expected))
    fetched = await fetch(storage, s3, tmp_path / "in", "many/")
    assert tree(fetched.source) == expected


async def test_large_object_in_parts(storage: S3Storage, s3: S3Server, tmp_path: Path) -> None:
    data = os.urandom(5 * PART_BYTES + 12345)
    s3.put("big.bin", data)
    fetched = await fetch(
        storage, s3, tmp_path / "in", "big.bin", checksumSha256=hashlib.sha256(data).hexdigest()
    )
    assert (fetched.source / "big.bin").read_bytes() == data
    with pytest.raises(TerminalError, match="SHA-256"):
        await fetch(storage, s3, tmp_path / "in2", "big.bin", checksumSha256="0" * 64)


async def test_what_is_here_is_not_fetched_again(
    storage: S3Storage, s3: S3Server, tmp_path: Path
) -> None:
    s3.put("a/x", b"x")
    s3.put("a/y", b"y")
    first = await fetch(storage, s3, tmp_path / "1", "a/")
    second = await fetch(storage, s3, tmp_path / "2", "a/x")
    assert (second.source / "x").samefile(first.source / "x")
    s3.put("a/x", b"changed")
    third = await fetch(storage, s3, tmp_path / "3", "a/")
    assert tree(third.source) == {"x": b"changed", "y": b"y"}
    assert (third.source / "y").samefile(first.source / "y")


async def test_a_fetch_goes_on_where_an_earlier_one_ended(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(6 * PART_BYTES)
    s3.put("big.bin", data)
    starts: list[int] = []
    original = S3Storage._part

    async def part(self: S3Storage, *args: object) -> object:
        starts.append(args[2])  # type: ignore[arg-type]
        if args[2] == 4 * PART_BYTES and len(starts) <= 6:
            raise TransientError("the line broke")
        return await original(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(S3Storage, "_part", part)
    for attempt in range(2):
        async with input_cache(tmp_path / "cache") as cache:
            storage = S3Storage(cache, S3Access([s3.url]), MemoryPins(), size_bytes_max=48 * MIB)
            if attempt == 0:
                with pytest.raises(TransientError, match="the line broke"):
                    await fetch(storage, s3, tmp_path / "in", "big.bin")
                starts.clear()
                starts.extend([-1] * 7)
            else:
                fetched = await fetch(storage, s3, tmp_path / "in", "big.bin")
    assert (fetched.source / "big.bin").read_bytes() == data
    assert starts[7] > 0, "it did not begin at the beginning"


async def test_versions(
    storage: S3Storage, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = "versioned"
    s3.admin.create_bucket(Bucket=bucket)
    s3.admin.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    old = s3.admin.put_object(Bucket=bucket, Key="x", Body=b"old")["VersionId"]
    s3.admin.put_object(Bucket=bucket, Key="x", Body=b"new")
    as_user(monkeypatch, ADMIN)
    async with input_cache(tmp_path / "cache2") as cache:
        own = S3Storage(cache, S3Access([s3.url]), MemoryPins(), size_bytes_max=MIB)
        given = item("s3", bucket=bucket, key="x", endpoint=s3.url, versionId=old)
        fetched = await own.fetch(given, tmp_path, USE)
        assert tree(fetched.source) == {"x": b"old"}
    reason = await storage.admit(item("s3", bucket="data", key="a/", versionId=old).source)
    assert "versionId is of one object" in reason


# What is refused


async def test_rights(
    s3: S3Server, cache: InputCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("x", b"x")
    s3.admin.create_bucket(Bucket="secret")
    s3.put("x", b"x", bucket="secret")
    for keys in (READER, (READER[0], "wrong-hunter2"), None):
        as_user(monkeypatch, keys)
        storage = S3Storage(cache, S3Access([s3.url]), MemoryPins(), size_bytes_max=MIB)
        for key in ("x", ""):
            with pytest.raises(TerminalError, match="with this node's credentials") as caught:
                await fetch(storage, s3, tmp_path / "in", key, bucket="secret")
            assert "hunter2" not in str(caught.value)


async def test_endpoints_get_the_nodes_credentials_only_if_allowed(
    s3: S3Server, cache: InputCache, tmp_path: Path
) -> None:
    s3.put("x", b"x")
    storage = S3Storage(cache, S3Access([]), MemoryPins(), size_bytes_max=MIB)
    source = item("s3", bucket="data", key="x", endpoint=s3.url).source
    assert "--s3-endpoint" in await storage.admit(source)
    with pytest.raises(TerminalError, match="--s3-endpoint"):
        await fetch(storage, s3, tmp_path / "in", "x")


async def test_the_endpoint_of_the_environment_is_the_default(
    s3: S3Server, cache: InputCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("x", b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url + "/")
    storage = S3Storage(cache, S3Access([]), MemoryPins(), size_bytes_max=MIB)
    fetched = await storage.fetch(item("s3", bucket="data", key="x"), tmp_path, USE)
    assert tree(fetched.source) == {"x": b"x"}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"key": "absent"}, "does not exist"),
        ({"key": "absent/"}, "matches"),
        ({"key": "", "bucket": "no-such-bucket"}, r"does not exist|credentials"),
        ({"key": "x", "region": "nowhere-1"}, ""),
    ],
)
async def test_what_is_not_there(
    storage: S3Storage, s3: S3Server, tmp_path: Path, params: dict[str, str], words: str
) -> None:
    s3.put("x", b"x")
    if not words:  # a server that does not look at regions
        await fetch(storage, s3, tmp_path / "in", **params)  # type: ignore[arg-type]
        return
    with pytest.raises(TerminalError, match=words):
        await fetch(storage, s3, tmp_path / "in", **params)  # type: ignore[arg-type]


async def test_an_endpoint_that_does_not_answer(cache: InputCache, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"
    storage = S3Storage(cache, S3Access([url]), MemoryPins(), size_bytes_max=MIB)
    with pytest.raises(TransientError, match="could not be"):
        await storage.fetch(item("s3", bucket="data", key="x", endpoint=url), tmp_path, USE)


async def test_size_cap(cache: InputCache, s3: S3Server, tmp_path: Path) -> None:
    s3.put("a/1", bytes(600))
    s3.put("a/2", bytes(600))
    storage = S3Storage(cache, S3Access([s3.url]), MemoryPins(), size_bytes_max=1000)
    with pytest.raises(TerminalError, match="holds 1200 bytes in 2 objects"):
        await fetch(storage, s3, tmp_path / "in", "a/")


async def test_a_file_and_a_directory_of_one_name(
    storage: S3Storage, s3: S3Server, tmp_path: Path
) -> None:
    s3.put("a/x/y", b"y")
    s3.put("a/xz", b"z")
    await fetch(storage, s3, tmp_path / "in", "a/")
    # This server keeps directories itself, so the clash comes from cutting nothing off.
    from bacalhau.storages.objects import Entry, select
    from bacalhau.storages.s3 import _paths

    for keys in (["a/x", "a/x/y"], ["a/x/y", "a/x"]):
        with pytest.raises(TerminalError, match="of the same name"):
            _paths([Entry(key, 1, "e") for key in keys], select("a/"))


async def test_secrets_stay_out_of_logs(
    storage: S3Storage, s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="bacalhau")
    s3.put("x", b"x")
    await fetch(storage, s3, tmp_path / "in", "x")
    assert READER[1] not in caplog.text


# Partitions


def use_of(partition: int, count: int, generation: int = 1) -> Use:
    return Use("default", "uid", generation, f"job-{partition}", 0, partition, count)


async def test_each_object_is_in_one_partition_whatever_changes(
    storage: S3Storage, s3: S3Server, tmp_path: Path, pins: MemoryPins
) -> None:
    names = [f"{n:03}" for n in range(40)]
    for name in names:
        s3.put(f"p/{name}", name.encode())
    split = {"partition": {"type": "object"}}
    first = await fetch(storage, s3, tmp_path / "0", "p/", use_of(0, 4), **split)
    for name in ("new1", "new2", "new3"):
        s3.put(f"p/{name}", b"came too late")
    rest = [
        await fetch(storage, s3, tmp_path / str(n), "p/", use_of(n, 4), **split) for n in (1, 2, 3)
    ]
    found = [name for fetched in (first, *rest) for name in tree(fetched.source)]
    assert sorted(found) == names
    assert len(pins.pinned) == 1
    again = await fetch(storage, s3, tmp_path / "again", "p/", use_of(0, 4), **split)
    assert tree(again.source) == tree(first.source)
    newer = [
        await fetch(storage, s3, tmp_path / f"g{n}", "p/", use_of(n, 4, 2), **split)
        for n in range(4)
    ]
    assert sum(len(tree(fetched.source)) for fetched in newer) == 43


async def test_none_gives_all_partitions_the_same_set(
    storage: S3Storage, s3: S3Server, tmp_path: Path
) -> None:
    s3.put("p/a", b"a")
    first = await fetch(storage, s3, tmp_path / "0", "p/", use_of(0, 2))
    s3.put("p/b", b"b")
    second = await fetch(storage, s3, tmp_path / "1", "p/", use_of(1, 2))
    assert tree(first.source) == tree(second.source) == {"a": b"a"}


async def test_a_pinned_object_that_changed_is_refused(
    storage: S3Storage, s3: S3Server, tmp_path: Path
) -> None:
    s3.put("p/a", b"a")
    s3.put("p/b", b"b")
    split = {"partition": {"type": "object"}}
    use = [use_of(n, 2) for n in range(2)]
    fetched = await fetch(storage, s3, tmp_path / "0", "p/", use[0], **split)
    gone = {"a", "b"} - set(tree(fetched.source))
    for name in gone:
        s3.put(f"p/{name}", b"another")
    other = fetch(storage, s3, tmp_path / "1", "p/", use[1], **split)
    if gone:
        with pytest.raises(TerminalError, match="since this job's objects were pinned"):
            await other
    else:
        assert tree((await other).source) == {}


async def test_a_partition_may_be_empty(storage: S3Storage, s3: S3Server, tmp_path: Path) -> None:
    s3.put("p/a", b"a")
    split = {"partition": {"type": "object"}}
    found = [
        tree((await fetch(storage, s3, tmp_path / str(n), "p/", use_of(n, 3), **split)).source)
        for n in range(3)
    ]
    assert sorted(map(len, found)) == [0, 0, 1]


async def test_partitions_at_one_time(storage: S3Storage, s3: S3Server, tmp_path: Path) -> None:
    for n in range(30):
        s3.put(f"p/{n}", str(n).encode())
    split = {"partition": {"type": "object"}}
    got = await asyncio.gather(
        *(fetch(storage, s3, tmp_path / str(n), "p/", use_of(n, 6), **split) for n in range(6))
    )
    assert sorted(name for one in got for name in tree(one.source)) == sorted(map(str, range(30)))
