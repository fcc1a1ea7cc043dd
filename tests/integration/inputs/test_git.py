"""git inputs from a real repository over HTTP."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from bacalhau.storages.cache import InputCache
from bacalhau.storages.git import GitStorage
from bacalhau.storages.pins import MemoryPins
from bacalhau.transfer.addresses import AddressPolicy, AddressRefusedError
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_controllers.runner.ports import Fetched, Use
from tests.support.git import Repository, git_repository
from tests.support.inputs import LOOPBACK, MIB, USE, input_cache, item, tree
from tests.support.web import File, web_site


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with git_repository(tmp_path / "git") as repository:
        yield repository


@pytest.fixture
async def cache(tmp_path: Path) -> AsyncIterator[InputCache]:
    async with input_cache(tmp_path / "cache") as cache:
        yield cache


@pytest.fixture
def storage(cache: InputCache) -> GitStorage:
    return GitStorage(cache, LOOPBACK, MemoryPins(), size_bytes_max=8 * MIB)


async def fetch(
    storage: GitStorage, into: Path, url: str, ref: str = "", use: Use = USE
) -> Fetched:
    os.makedirs(into, exist_ok=True)
    return await storage.fetch(item("git", url=url, ref=ref), into, use)


async def test_branches_tags_and_commits(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    old = repository.commit({"a": b"old", "dir/b": b"b"})
    repository.git("tag", "--annotate", "v1", "--message", "first")
    repository.git("branch", "side")
    new = repository.commit({"a": b"new"})
    url = repository.url
    expected = {old: b"old", new: b"new"}
    for number, (ref, commit) in enumerate(
        [("", new), ("main", new), ("side", old), ("v1", old), ("refs/tags/v1", old), (old, old)]
    ):
        fetched = await fetch(storage, tmp_path / str(number), url, ref)
        assert tree(fetched.source) == {"a": expected[commit], "dir/b": b"b"}, ref
    assert not (fetched.source / ".git").exists()


async def test_all_partitions_get_the_same_commit(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    repository.commit({"a": b"old"})
    first = await fetch(
        storage, tmp_path / "0", repository.url, "main", Use("default", "uid", 1, "e-0", 0, 0, 2)
    )
    repository.commit({"a": b"new"})
    second = await fetch(
        storage, tmp_path / "1", repository.url, "main", Use("default", "uid", 1, "e-1", 0, 1, 2)
    )
    later = await fetch(
        storage, tmp_path / "2", repository.url, "main", Use("default", "uid", 2, "e-2", 0, 1, 2)
    )
    assert tree(first.source) == tree(second.source) == {"a": b"old"}
    assert tree(later.source) == {"a": b"new"}


async def test_a_commit_that_is_here_is_not_fetched_again(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    commit = repository.commit({"a": b"a", "same": b"same"})
    first = await fetch(storage, tmp_path / "0", repository.url, commit)
    count = len(repository.requests)
    again = await fetch(storage, tmp_path / "1", repository.url, commit)
    assert len(repository.requests) == count
    assert (again.source / "a").samefile(first.source / "a")
    other = repository.commit({"a": b"changed"})
    third = await fetch(storage, tmp_path / "2", repository.url, other)
    assert (third.source / "same").samefile(first.source / "same")


async def test_links_and_modes(repository: Repository, storage: GitStorage, tmp_path: Path) -> None:
    (repository.place / "run.sh").write_text("#!/bin/sh\n")
    (repository.place / "run.sh").chmod(0o755)
    (repository.place / "link").symlink_to("dir/b")
    repository.commit({"dir/b": b"b"})
    fetched = await fetch(storage, tmp_path / "in", repository.url)
    assert os.access(fetched.source / "run.sh", os.X_OK)
    assert (fetched.source / "link").read_bytes() == b"b"
    assert os.readlink(fetched.source / "link") == "dir/b"


async def test_links_that_lead_out_are_refused(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    (repository.place / "link").symlink_to("/etc/passwd")
    repository.commit({"a": b"a"})
    with pytest.raises(TerminalError, match="cannot be used"):
        await fetch(storage, tmp_path / "in", repository.url)
    assert tree(tmp_path / "in") == {}


async def test_the_repository_cannot_change_what_is_checked_out(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    attributes = b"secret export-ignore\nfile export-subst\n*.txt filter=evil\n"
    repository.commit(
        {".gitattributes": attributes, "secret": b"s", "file": b"$Format:%H$", "x.txt": b"x"}
    )
    fetched = await fetch(storage, tmp_path / "in", repository.url)
    found = tree(fetched.source)
    assert found["secret"] == b"s"
    assert found["file"] == b"$Format:%H$"


async def test_addresses_are_vetted_where_git_connects(
    repository: Repository, cache: InputCache, tmp_path: Path
) -> None:
    repository.commit({"a": b"a"})
    storage = GitStorage(cache, AddressPolicy(), MemoryPins(), size_bytes_max=MIB)
    assert "loopback" in await storage.admit(item("git", url=repository.url).source)
    by_name = repository.url.replace("127.0.0.1", "localhost")
    with pytest.raises(AddressRefusedError, match="--allow-address"):
        await fetch(storage, tmp_path / "in", by_name)
    assert repository.requests == []


async def test_redirects_are_vetted_too(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    repository.commit({"a": b"a"})
    with web_site() as site:
        path = "/x.git/info/refs"
        site.files[path] = File(status=302, location="http://169.254.169.254/latest/info/refs")
        with pytest.raises(AddressRefusedError, match="metadata"):
            await fetch(storage, tmp_path / "in", site.url("/x.git"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc", "must be a repository"),
        ("ssh://git@127.0.0.1/x", "must begin with https"),
        ("git@example.org:x.git", "must begin with https"),
        ("http://user:hunter2@127.0.0.1/x.git", "user name or password"),
        ("ext::sh -c id", "may not contain spaces"),
        ("http://169.254.169.254/x.git", "metadata"),
    ],
)
async def test_urls_that_are_refused(storage: GitStorage, url: str, words: str) -> None:
    reason = await storage.admit(item("git", url=url).source)
    assert words in reason
    assert "hunter2" not in reason.replace(url, "") or "hunter2" not in reason


@pytest.mark.parametrize("ref", ["--upload-pack=id", "a b", "a..b", "a:b", "a^{}", "@{1}"])
async def test_refs_that_are_refused(storage: GitStorage, ref: str) -> None:
    source = item("git", url="http://127.0.0.1/x.git", ref=ref).source
    assert "is no name of a branch or tag" in await storage.admit(source)


async def test_what_is_not_there(
    repository: Repository, storage: GitStorage, tmp_path: Path
) -> None:
    repository.commit({"a": b"a"})
    with pytest.raises(TerminalError, match="no branch, tag or commit 'absent'"):
        await fetch(storage, tmp_path / "1", repository.url, "absent")
    with pytest.raises(TerminalError):
        await fetch(storage, tmp_path / "2", repository.url, "0" * 40)
    with pytest.raises(TerminalError, match="not found"):
        await fetch(storage, tmp_path / "3", repository.url.replace("/repo/", "/other/"))
    with pytest.raises(TransientError):
        await fetch(storage, tmp_path / "4", "http://127.0.0.1:9/x.git")


async def test_size_cap(
    repository: Repository, storage: GitStorage, cache: InputCache, tmp_path: Path
) -> None:
    repository.commit({"big": os.urandom(9 * MIB)})
    with pytest.raises(TerminalError, match="--input-max-size") as caught:
        await fetch(storage, tmp_path / "1", repository.url)
    assert caught.value.reason == "InputTooLarge"
    repository.commit({"big": bytes(20 * MIB)})  # packs to nothing
    with pytest.raises(TerminalError, match=r"more than \d+ bytes"):
        await fetch(storage, tmp_path / "2", repository.url)
    assert cache.usage().used_bytes == 0
    assert os.listdir(tmp_path / "cache" / "partial") == []


async def test_cancelling_ends_git(cache: InputCache, storage: GitStorage, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.git"
        wish = asyncio.create_task(fetch(storage, tmp_path / "in", url))
        connection, _ = await asyncio.to_thread(silent.accept)
        with connection:
            wish.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(wish, 20)
