"""Inputs that come as a whole tree, such as a directory in IPFS or a commit in git.

A tree is a content of its own: the list of its files by digest, and of its symbolic links. So files
that two trees share are kept once, and a tree is here if its list and all its files are.
"""

import asyncio
import json
import os
import shutil
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from bacalhau.storages.cache import Fetch, Hold
from bacalhau.storages.disk import check_tree_path, disk
from bacalhau.storages.draft import Blob
from bacalhau_api.errors import TerminalError

Fill = Callable[[Fetch, Path], Awaitable[None]]
"""Brings a tree into an empty directory. What it leaves there was extracted with care: regular
files, directories, and symbolic links that stay within."""

_TRIES_MAX = 3


@dataclass(frozen=True, slots=True)
class Tree:
    """Files by path, and the targets of symbolic links. `root_file` names the only file of what
    is not a directory."""

    files: dict[str, Blob]
    links: dict[str, str]
    root_file: str = ""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(blob.size_bytes for blob in self.files.values())


async def obtain_tree(hold: Hold, identity: str, fill: Fill, *, size_bytes_max: int) -> Tree:
    """The tree of an identity that always means the same, from the cache or by `fill`."""

    async def bring(fetch: Fetch) -> Blob:
        staging = fetch.draft.path.with_name(f"{fetch.draft.key}.d")
        await fetch.in_thread(_begin, staging)
        try:
            await fill(fetch, staging)
            return await fetch.in_thread(_take_in, fetch, staging, size_bytes_max)
        finally:
            await asyncio.shield(fetch.threads.quick(_remove, staging))

    for _ in range(_TRIES_MAX):
        blob = await hold.obtain(f"tree:{identity}", bring, is_fixed=True)
        tree = await _held(hold, blob)
        if tree is not None:
            return tree
        # Some of its files were evicted: the list alone is worth nothing.
        await hold.cache.threads.quick(hold.cache.store.drop, blob.sha256, hold.held)
    raise TerminalError(
        "the input does not fit into this node's input cache", reason="InputTooLarge"
    )


async def _held(hold: Hold, listing: Blob) -> Tree | None:
    """The tree of a list, with all its files held; None if one is not here."""
    data = json.loads(await hold.cache.threads.quick(listing.path.read_bytes))
    files: dict[str, Blob] = {}
    for path, sha256 in data["files"].items():
        blob = await hold.blob(sha256)
        if blob is None:
            return None
        files[path] = blob
    return Tree(files, data["links"], data["rootFile"])


# -- in threads ----------------------------------------------------------------------------------


def _begin(staging: Path) -> None:
    with disk("the input cache cannot be written"):
        _remove(staging)
        staging.mkdir(mode=0o700)


def _remove(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)


def _take_in(fetch: Fetch, staging: Path, size_bytes_max: int) -> Blob:
    """Move the files of a tree into the cache, and write down what it consists of."""
    store = fetch.draft.store
    with disk("the input cache cannot be written"):
        found = list(_walk(staging))
        size = sum(status.st_size for _, status in found if stat.S_ISREG(status.st_mode))
        if size > size_bytes_max:
            raise TerminalError(
                f"the input has {size} bytes; this node takes at most {size_bytes_max} for one "
                "(--input-max-size)",
                reason="InputTooLarge",
            )
        store.reserve(fetch.draft.key, size)
        files: dict[str, str] = {}
        links: dict[str, str] = {}
        try:
            for path, status in found:
                fetch.transfer.check()
                name = check_tree_path(str(path.relative_to(staging)))
                if stat.S_ISLNK(status.st_mode):
                    links[name] = os.readlink(path)
                elif stat.S_ISREG(status.st_mode):
                    is_executable = bool(status.st_mode & stat.S_IXUSR)
                    files[name] = store.adopt(path, is_executable=is_executable).sha256
                    store.settle(fetch.draft.key, max(size - status.st_size, 0))
                    size -= status.st_size
            root_file = ROOT_FILE if ROOT_FILE in files and len(files) == 1 else ""
            text = json.dumps({"files": files, "links": links, "rootFile": root_file})
            fetch.draft.begin("")
            fetch.draft.write(text.encode())
            return fetch.draft.finish()
        finally:
            for sha256 in files.values():
                store.release(sha256)


ROOT_FILE = ".bacalhau-root-file"
"""The name in a staging directory of what is a file and not a directory."""


def _walk(root: Path) -> list[tuple[Path, os.stat_result]]:
    found: list[tuple[Path, os.stat_result]] = []
    for directory, folders, names in os.walk(root):
        for name in (*names, *folders):
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                found.append((path, status))
    return sorted(found, key=lambda one: str(one[0]))
