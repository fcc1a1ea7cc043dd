"""Inputs that come within the job: RFC 2397 `data:` URLs.

    data:[<media type>][;base64],<data>

One of type application/gzip is a tar.gz and becomes a directory; any other a single file.
"""

import asyncio
import base64
import binascii
import io
import os
import shutil
from pathlib import Path
from urllib.parse import unquote_to_bytes

from pydantic import Field

from bacalhau.archive import ArchiveError, ArchiveLimits, extract
from bacalhau.flush import fsync_path, sync_file_system
from bacalhau.params import read_params
from bacalhau_api.base import Model
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_api.v1.job import InputSource, SpecConfig
from bacalhau_controllers.runner.ports import Fetched, Health, Progress, Use

_LIMITS = ArchiveLimits(size_bytes_max=256 * 1024 * 1024, entries_max=10_000)
_ARCHIVES = frozenset({"application/gzip", "application/x-gzip"})


class InlineParams(Model):
    """Parameters of the source type `inline`."""

    url: str = Field(min_length=1)


class InlineStorage:
    """Unpacks data URLs.

    `size_bytes_max` bounds the data of one URL as decoded, `limits` what an archive holds.
    """

    def __init__(
        self,
        *,
        size_bytes_max: int = 16 * 1024 * 1024,
        limits: ArchiveLimits = _LIMITS,
    ) -> None:
        self._size_bytes_max = size_bytes_max
        self._limits = limits

    async def health(self) -> Health:
        """Needs nothing, so it is always there."""
        return Health(is_available=True)

    async def admit(self, source: SpecConfig) -> str:
        """Empty if the URL can be decoded and is not too large; `fetch` opens archives."""
        try:
            self._decode(source)
        except TerminalError as error:
            return error.message
        return ""

    async def fetch(self, item: InputSource, into: Path, use: Use) -> Fetched:
        """A file, or for an archive a directory, below `into`."""
        kind, data = self._decode(item.source)
        try:
            return await asyncio.to_thread(self._unpack, kind, data, into)
        except ArchiveError as error:
            raise TerminalError(
                f"source inline for {item.target}: {error.message}", reason=error.reason
            ) from error
        except OSError as error:
            raise TransientError(f"source inline cannot be stored: {error.strerror}") from error

    def progress(self, into: Path) -> Progress | None:
        """None: it takes no time to speak of."""
        return None

    def _unpack(self, kind: str, data: bytes, into: Path) -> Fetched:
        """On disk when it returns: after a power failure the execution goes on with what is here."""
        if kind not in _ARCHIVES:
            path = into / "data"
            # A fetch that was cut off may have left a part.
            path.unlink(missing_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with os.fdopen(fd, "wb") as file:
                os.fchmod(fd, 0o644)  # the process's umask is not for what workloads read
                file.write(data)
                file.flush()
                os.fsync(fd)
            fsync_path(into)
            return Fetched(source=path.resolve(), read_only=True, size_bytes=len(data))
        directory = into / "content"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        done = extract(io.BytesIO(data), directory, self._limits)
        for folder, _, _ in os.walk(directory):
            os.chmod(folder, 0o755)
        sync_file_system(into)
        return Fetched(source=directory.resolve(), read_only=True, size_bytes=done.size_bytes)

    def _decode(self, source: SpecConfig) -> tuple[str, bytes]:
        """The media type in lower case, and the bytes."""
        url = read_params(
            InlineParams, source.params, what="source inline", reason="InvalidInput"
        ).url
        head, comma, body = url.partition(",")
        scheme, colon, description = head.partition(":")
        if scheme.lower() != "data" or not colon or not comma:
            raise _invalid("params.url must be a data URL: data:[<type>][;base64],<data>")
        kind, *options = (part.strip().lower() for part in description.split(";"))
        # Percent signs triple the size at most, base64 adds a third: refuse before decoding.
        if len(body) > 3 * self._size_bytes_max:
            raise self._too_large()
        data = unquote_to_bytes(body)
        if "base64" in options:
            try:
                data = base64.b64decode(b"".join(data.split()), validate=True)
            except binascii.Error as error:
                raise _invalid(f"params.url has wrong base64 data: {error}") from error
        if len(data) > self._size_bytes_max:
            raise self._too_large()
        return kind or "text/plain", data

    def _too_large(self) -> TerminalError:
        return _invalid(
            f"params.url holds more than the {self._size_bytes_max} bytes allowed; "
            "put larger data on storage that nodes reach, and name it"
        )


def _invalid(message: str) -> TerminalError:
    return TerminalError(f"source inline: {message}", reason="InvalidInput")
