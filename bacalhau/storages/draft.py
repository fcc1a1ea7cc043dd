"""One content on its way into the input cache."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bacalhau.storages.disk import disk
from bacalhau_api.errors import TerminalError

if TYPE_CHECKING:
    from bacalhau.storages.content import ContentStore

FLUSH_BYTES: Final = 256 * 1024 * 1024
"""Of a long transfer, between two points from which it could go on after a power failure."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One whole content."""

    sha256: str
    size_bytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class Known:
    """What a source had last time; `note` is the fetcher's own, such as an ETag."""

    blob: Blob
    note: str


class Draft:
    """One content on its way: bytes are appended, hashed on the way, and can be gone on with.

    Used by one thread at a time. `begin` first, then `write`, then `finish`.
    """

    def __init__(self, store: "ContentStore", identity: str, key: str, path: Path) -> None:
        self.identity = identity
        self.path = path
        self._store = store
        self._key = key
        self._hash = hashlib.sha256()
        self._file: int | None = None
        self._flushed = 0
        self._validator = ""
        self.size_bytes = 0

    def begin(self, validator: str, total: int | None = None) -> int:
        """Open for appending; return how many bytes are here already.

        They count only if `validator`, which says what version of a source they are of, is that
        of last time and not empty.
        """
        with disk("the input cache cannot be written"):
            self.close()
            kept = self.left(validator) if validator else 0
            self._validator = validator
            self._hash = hashlib.sha256()
            self._store.reserve(self._key, max(total or 0, kept))
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self.path, flags, 0o600)
            os.ftruncate(self._file, kept)
            self.size_bytes = self._flushed = 0
            while self.size_bytes < kept:
                data = os.pread(self._file, min(1 << 20, kept - self.size_bytes), self.size_bytes)
                if not data:
                    break
                self._hash.update(data)
                self.size_bytes += len(data)
            os.lseek(self._file, self.size_bytes, os.SEEK_SET)
            if validator:
                if kept:  # by a try that may have ended long before it would have flushed
                    os.fdatasync(self._file)
                self._note(self.size_bytes)
            else:
                self._side.unlink(missing_ok=True)
        return self.size_bytes

    def left(self, validator: str) -> int:
        """Bytes of such a version that an earlier try has left."""
        try:
            note = json.loads(self._side.read_text())
            size = self.path.stat().st_size
            if note["validator"] != validator or not validator:
                return 0
            # After a power failure only what was flushed is surely what was written.
            return size if note["boot"] == self._store.boot else min(size, int(note["flushed"]))
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    @property
    def validator(self) -> str:
        """Of what an earlier try has left; empty if nothing is left that can be gone on with."""
        try:
            found = json.loads(self._side.read_text())["validator"]
            return str(found) if self.left(str(found)) else ""
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append. Raises TerminalError or CacheFullError if there is no room."""
        assert self._file is not None
        with disk("the input cache cannot be written"):
            size = self.size_bytes + len(data)
            self._store.reserve(self._key, size)
            view = memoryview(data)
            while view:
                view = view[os.write(self._file, view) :]
            self._hash.update(data)
            self.size_bytes = size
            if size - self._flushed >= FLUSH_BYTES:
                os.fdatasync(self._file)
                if self._validator:
                    self._note(size)
                self._flushed = size

    def finish(self, note: str = "", sha256: str = "") -> Blob:
        """All is here. With `sha256`, raises TerminalError if it is something else."""
        assert self._file is not None
        found = self._hash.hexdigest()
        self.close()
        if sha256 and found != sha256:
            self.discard()
            raise TerminalError(
                f"its SHA-256 is {found}, but {sha256} was asked for: it was changed or damaged",
                reason="ChecksumMismatch",
            )
        return self._store.commit(self, found, self.size_bytes, note)

    def keep(self, known: Known, note: str = "") -> Blob:
        """The source still has what it had."""
        self.discard()
        self._store.remember(self.identity, known.blob.sha256, note or known.note)
        return known.blob

    def discard(self) -> None:
        """Forget what is here of it."""
        self.close()
        self._store.forget(self._key)

    def close(self) -> None:
        """Let go of the file; what is in it stays for the next try."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)
            self._store.settle(self._key, self.size_bytes)

    @property
    def key(self) -> str:
        """Its name on disk."""
        return self._key

    @property
    def store(self) -> "ContentStore":
        """Where it is going."""
        return self._store

    @property
    def _side(self) -> Path:
        return self.path.with_name(f"{self._key}.json")

    def _note(self, flushed: int) -> None:
        self._flushed = flushed
        text = json.dumps(
            {"validator": self._validator, "flushed": flushed, "boot": self._store.boot}
        )
        fresh = self._side.with_suffix(".new.json")
        fresh.write_text(text)
        os.replace(fresh, self._side)
