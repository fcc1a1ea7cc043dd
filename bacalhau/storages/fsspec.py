"""Inputs by any fsspec protocol that the operator allowed: the long tail, such as gs, abfs or sftp.

A URL names one file, or with `/` at the end a directory. Credentials are the node's own, in the way of
each protocol; a job cannot give options. Protocols that read the node's disk can never be
allowed, nor URLs that chain protocols. Addresses are not vetted: the protocol's own library connects.
"""

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from bacalhau.params import read_params
from bacalhau.storages.cache import Fetch, InputCache, use_key
from bacalhau.storages.disk import check_tree_path
from bacalhau.storages.draft import Blob
from bacalhau.storages.protocols import check_protocol
from bacalhau.transfer.progress import CancelledTransferError, Transfer
from bacalhau_api.base import Model
from bacalhau_api.errors import BacalhauError, TerminalError, UnavailableError
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

CHUNK_BYTES = 1024 * 1024
OBJECTS_MAX = 100_000


class FsspecParams(Model):
    """Parameters of the source type `fsspec`."""

    url: str = Field(min_length=1)


class FsspecStorage:
    """Reads by fsspec, in threads. `protocols` are those that jobs may name."""

    def __init__(self, cache: InputCache, *, protocols: Sequence[str], size_bytes_max: int) -> None:
        self._cache = cache
        self._protocols = tuple(check_protocol(one) for one in protocols)
        self._size_bytes_max = size_bytes_max

    async def health(self) -> Health:
        """Available if any protocol is allowed."""
        if not self._protocols:
            return Health(
                is_available=False,
                reason="this node allows no fsspec protocols; see --allow-protocol",
            )
        return Health(is_available=True, version=",".join(self._protocols))

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the URL's protocol is allowed."""
        try:
            self._url(source)
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """A directory with the file, or with the files of the directory."""
        protocol, url = self._url(item.source)
        transfer = Transfer()
        found = await self._cache.threads.run(transfer, self._list, protocol, url, transfer)
        blobs: dict[str, Blob] = {}
        async with self._cache.hold(into, use_key(item, use)) as hold:
            hold.total = sum(size for _, size, _ in found.values())
            for name, (path, size, version) in found.items():

                async def bring(fetch: Fetch, path: str = path, size: int = size) -> Blob:
                    return await fetch.in_thread(self._read, fetch, protocol, url, path, size)

                identity = f"fsspec:{protocol}://{path} {version} {size}"
                blobs[name] = await hold.obtain(identity, bring, is_fixed=bool(version))
            source = await hold.place(blobs)
        size = sum(blob.size_bytes for blob in blobs.values())
        return Fetched(source=source, read_only=True, size_bytes=size)

    def progress(self, into: Path) -> Progress | None:
        """See Storage."""
        return self._cache.progress(into)

    def _url(self, source: SpecConfig) -> tuple[str, str]:
        """The protocol and the URL. Raises TerminalError."""
        url = read_params(
            FsspecParams, source.params, what="source fsspec", reason="InvalidInput"
        ).url
        protocol, separator, rest = url.partition("://")
        protocol = protocol.lower()
        if not separator or not rest or "::" in url or re.search(r"[\s\x00-\x1f]", url):
            raise _invalid("params.url must be like gs://bucket/file, without '::'")
        if protocol not in self._protocols:
            known = ", ".join(self._protocols) or "none"
            raise _invalid(
                f"this node does not allow the protocol {protocol[:40]!r} (it allows: {known}); its "
                "operator can with --allow-protocol"
            )
        if "@" in rest.partition("/")[0]:
            raise _invalid("params.url holds a user name or password; take it out")
        return protocol, url

    # -- in threads ------------------------------------------------------------------------------

    def _list(self, protocol: str, url: str, transfer: Transfer) -> dict[str, tuple[str, int, str]]:
        """Files by where they appear: path, size, and what changes when the file does."""
        try:
            system, path = _open(url)
            if url.endswith("/"):
                base = path.rstrip("/") + "/"
                infos = system.find(path, detail=True)
            else:
                base = posixpath.dirname(path).rstrip("/") + "/" if "/" in path else ""
                infos = {path: system.info(path)}
        except BacalhauError:
            raise
        except Exception as error:
            raise _translated(protocol, error) from error
        transfer.check()
        files = {k: v for k, v in infos.items() if v.get("type") == "file"}
        size = sum(int(info.get("size") or 0) for info in files.values())
        if len(files) > OBJECTS_MAX or size > self._size_bytes_max:
            raise TerminalError(
                f"{protocol}: {len(files)} files with {size} bytes are more than this node takes for "
                "one input (--input-max-size)",
                reason="InputTooLarge",
            )
        if not files:
            raise TerminalError(f"{protocol}: there is no such file", reason="InputFailed")
        found: dict[str, tuple[str, int, str]] = {}
        for name, info in files.items():
            try:
                shown = check_tree_path(name.removeprefix(base))
            except ValueError as error:
                raise TerminalError(
                    f"{protocol}: {name[:200]!r} cannot be a file: {error}", reason="InputFailed"
                ) from error
            found[shown] = (name, int(info.get("size") or 0), _version(info))
        return found

    def _read(self, fetch: Fetch, protocol: str, url: str, path: str, size: int) -> Blob:
        draft, transfer = fetch.draft, fetch.transfer
        transfer.total = size
        try:
            system, _ = _open(url)
            with system.open(path, "rb", block_size=CHUNK_BYTES, cache_type="none") as file:
                transfer.check()
                draft.begin("", size)
                while data := file.read(CHUNK_BYTES):
                    transfer.check()
                    if draft.size_bytes + len(data) > self._size_bytes_max:
                        raise TerminalError(f"{protocol}: the file grew", reason="InputTooLarge")
                    draft.write(data)
                    transfer.done = draft.size_bytes
        except (BacalhauError, CancelledTransferError):
            raise
        except Exception as error:
            raise _translated(protocol, error) from error
        if size and draft.size_bytes != size:
            raise UnavailableError(f"{protocol}: the file broke off, or changed meanwhile")
        return draft.finish()


def _open(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return system, str(path)


def _version(info: dict[str, Any]) -> str:
    """What changes when a file does; empty if nothing is known that does."""
    for name in (
        "etag",
        "ETag",
        "md5Hash",
        "generation",
        "mtime",
        "last_modified",
        "updated",
        "modify",
    ):
        if info.get(name):
            return f"{name}={info[name]}"
    return ""


def _translated(protocol: str, error: Exception) -> BacalhauError:
    """Words of a library we do not know may hold anything: only the kind of the error is told."""
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return TerminalError(f"{protocol}: there is no such file", reason="InputFailed")
    if isinstance(error, PermissionError):
        return TerminalError(
            f"{protocol}: access is denied with this node's credentials", reason="AccessDenied"
        )
    if isinstance(error, ImportError):
        return TerminalError(
            f"{protocol}: this node lacks the Python package for it", reason="PlugMissing"
        )
    if isinstance(error, ValueError | TypeError | NotImplementedError):
        return TerminalError(f"{protocol}: it cannot be read ({name})", reason="InputFailed")
    return UnavailableError(f"{protocol}: it could not be read ({name})")


def _invalid(message: str) -> TerminalError:
    return TerminalError(f"source fsspec: {message}", reason="InvalidInput")
