"""Inputs from IPFS, through the RPC API of a Kubo node or through a gateway.

What a CID names never changes, so it is fetched once. A CID that nobody has makes IPFS wait for
ever: a fetch that brings no byte for a while is given up, and tried again by the runner.
"""

import os
import re
import shutil
from pathlib import Path
from urllib.parse import quote

from bacalhau.archive import ArchiveError, ArchiveLimits, extract
from bacalhau.params import read_params
from bacalhau.storages.cache import Fetch, InputCache, use_key
from bacalhau.storages.disk import disk
from bacalhau.storages.trees import ROOT_FILE, obtain_tree
from bacalhau.transfer import http
from bacalhau.transfer.kubo import kubo_health
from bacalhau_api.errors import TerminalError, UnavailableError
from bacalhau_api.params import IpfsSource
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

ENTRIES_MAX = 1_000_000
_NOT_THERE = re.compile(
    r"not found|no link named|no such|invalid path|invalid cid|merkledag", re.IGNORECASE
)


class IpfsStorage:
    """Reads by `api` if there is one, else by `gateway`: addresses that the operator gave, which
    are therefore not vetted. `stall_seconds`: so long without a byte ends a fetch."""

    def __init__(
        self,
        cache: InputCache,
        *,
        api: str,
        gateway: str,
        stall_seconds: float,
        size_bytes_max: int,
    ) -> None:
        self._cache = cache
        self._api = api
        self._gateway = gateway
        self._stall_seconds = stall_seconds
        self._size_bytes_max = size_bytes_max

    async def health(self) -> Health:
        """Whether the API answers. A gateway is not asked: it may be far away."""
        if self._api:
            return await kubo_health(self._api)
        if self._gateway:
            return Health(is_available=True)
        return Health(
            is_available=False, reason="this node has no IPFS; see --ipfs-api and --ipfs-gateway"
        )

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the CID looks like one. IPFS is asked by `fetch`."""
        try:
            _path(source)
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """The directory, or the file itself if the CID is of one."""
        path = _path(item.source)

        async def fill(fetch: Fetch, staging: Path) -> None:
            await fetch.in_thread(self._get, fetch, path, staging)

        async with self._cache.hold(into, use_key(item, use)) as hold:
            tree = await obtain_tree(
                hold, f"ipfs:{path}", fill, size_bytes_max=self._size_bytes_max
            )
            if tree.root_file:
                name = path.rstrip("/").rpartition("/")[2]
                place = await hold.place({name: tree.files[tree.root_file]})
                return Fetched(place / name, read_only=True, size_bytes=tree.size_bytes)
            place = await hold.place(tree.files, tree.links)
        return Fetched(place, read_only=True, size_bytes=tree.size_bytes)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return self._cache.progress(into)

    # -- in a thread -----------------------------------------------------------------------------

    def _get(self, fetch: Fetch, path: str, staging: Path) -> None:
        """Unpack the tar that both kinds of servers give."""
        if self._api:
            url, method = f"{self._api}/api/v0/get?arg={quote(path, safe='')}", "POST"
        else:
            url, method = f"{self._gateway}/ipfs/{quote(path)}?format=tar", "GET"
        limits = ArchiveLimits(
            entries_max=ENTRIES_MAX, size_bytes_max=self._size_bytes_max, may_differ_in_case=True
        )
        with http.get(
            url,
            None,
            method=method,
            headers={"Accept": "application/x-tar"},
            transfer=fetch.transfer,
            stall_seconds=self._stall_seconds,
        ) as answer:
            self._check(answer, path)
            try:
                extract(_Counting(answer, fetch), staging, limits)  # type: ignore[arg-type]
            except ArchiveError as error:
                if "ends early" in error.message:
                    raise UnavailableError(f"IPFS broke off in the middle of {path}") from error
                raise TerminalError(
                    f"what IPFS has for {path} cannot be used: {error.message}",
                    reason="InputFailed",
                ) from error
        with disk("the input cache cannot be written"):
            _flatten(staging)

    def _check(self, answer: http.Answer, path: str) -> None:
        if answer.status == 200:
            return
        words = answer.body.read(2000).decode("utf-8", "replace")
        if _NOT_THERE.search(words) or answer.status in (400, 404, 410):
            raise TerminalError(
                f"IPFS has no {path}: {' '.join(words.split())[:300]}", reason="InputFailed"
            )
        http.check_status(answer, 200)


class _Counting:
    """A body as a file, which tells how far it is."""

    def __init__(self, answer: http.Answer, fetch: Fetch) -> None:
        self._answer = answer
        self._fetch = fetch

    def read(self, size: int = -1) -> bytes:
        self._fetch.transfer.check()
        data = self._answer.body.read(size)
        self._fetch.transfer.done += len(data)
        return data


def _flatten(staging: Path) -> None:
    """The tar holds one entry, named by the CID or the last part of the path: what is in it."""
    names = os.listdir(staging)
    if len(names) != 1:
        raise TerminalError(f"IPFS sent {len(names)} things for one", reason="InputFailed")
    top = staging.with_name(f"{staging.name}t")
    shutil.rmtree(top, ignore_errors=True)
    os.rename(staging / names[0], top)
    staging.rmdir()
    if top.is_dir() and not top.is_symlink():
        os.rename(top, staging)
    else:
        staging.mkdir(mode=0o700)
        os.rename(top, staging / ROOT_FILE)


def _path(source: SpecConfig) -> str:
    params = read_params(IpfsSource, source.params, what="source ipfs", reason="InvalidInput")
    path = params.cid.removeprefix("/ipfs/").strip("/")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise TerminalError(f"source ipfs: params.cid {path[:200]!r} is no path in IPFS")
    return path
