"""Contents on the node's disk, each once and named by its SHA-256, bounded in bytes.

    <root>/blobs/<2 digits>/<sha256>    whole contents, read-only
    <root>/partial/<key>[.json]         contents on their way, and how far they are safely on disk
    <root>/index.db                     sizes, order of use, and what each source had last time

An execution gets hard links in a directory of its own, mounted read-only. So the file system counts
who uses what: a content may be evicted only while the cache alone holds it, and no crash can leave
a use behind that nobody has. What is evicted first is what was used longest ago.

Blocking and thread-safe. How a content comes is in `draft.py`, who waits for whom in `cache.py`.
"""

import hashlib
import os
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bacalhau.flush import fsync_path, sync_file_system
from bacalhau.storages import held
from bacalhau.storages.disk import disk, link, make_parents
from bacalhau.storages.draft import Blob, Draft, Known
from bacalhau_api.errors import TerminalError, TransientError
from bacalhau_api.v1.node import HeldInput

_FLUSH_SINGLY_MAX: Final = 16
_SCHEMA: Final = """
create table if not exists blobs (
    sha256 text primary key, size integer not null, mtime integer not null,
    used integer not null, boot text not null, durable integer not null
) strict;
create index if not exists by_use on blobs (used);
create table if not exists sources (
    identity text primary key, sha256 text not null, note text not null, used integer not null
) strict;
"""
_SOURCES_MAX: Final = 1_000_000


class CacheFullError(TransientError):
    """Everything in the cache is in use; what executions hold is freed when they end."""

    reason = "InputCacheFull"


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes in the cache now, its bound, and what a fetch may still bring."""

    used_bytes: int
    bytes_max: int
    blobs: int


class ContentStore:
    """The disk part of the input cache.

    `boot` names the machine's present boot: what was not flushed in an earlier one may be torn.
    Raises TransientError (reason Disk) where the disk fails.
    """

    def __init__(self, root: Path, *, bytes_max: int, boot: str) -> None:
        self.root = root
        self.bytes_max = bytes_max
        self.boot = boot
        self._lock = threading.RLock()
        self._holds: Counter[str] = Counter()
        self._reserved: dict[str, int] = {}
        self._held: tuple[HeldInput, ...] | None = None
        with disk("the input cache cannot be opened"):
            for name in ("blobs", "partial"):
                (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = self._open()
            self._recover()

    def close(self) -> None:
        """Let go of the index."""
        with self._lock:
            self._db.close()

    # -- what is there ---------------------------------------------------------------------------

    def find(self, identity: str) -> Known | None:
        """What a source had last time, if that is still here."""
        with self._lock:
            row = self._db.execute(
                "select sha256, note from sources where identity = ?", (identity,)
            ).fetchone()
            if row is None:
                return None
            blob = self.blob(row[0])
            if blob is None:
                self._db.execute("delete from sources where identity = ?", (identity,))
                return None
            self._db.execute(
                "update sources set used = ? where identity = ?", (self._tick(), identity)
            )
            return Known(blob, row[1])

    def blob(self, sha256: str) -> Blob | None:
        """A content, if it is here and nobody has touched it."""
        with self._lock:
            row = self._db.execute(
                "select size, mtime from blobs where sha256 = ?", (sha256,)
            ).fetchone()
            if row is None:
                return None
            path = self._path(sha256)
            try:
                status = os.lstat(path)
            except OSError:
                status = None
            if status is None or (status.st_size, status.st_mtime_ns) != tuple(row):
                # Somebody changed or removed it: it is not what its name says any more.
                self._drop(sha256)
                return None
            self._db.execute("update blobs set used = ? where sha256 = ?", (self._tick(), sha256))
            return Blob(sha256, status.st_size, path)

    def usage(self) -> Usage:
        """How full it is."""
        with self._lock:
            count = self._db.execute("select count(*) from blobs").fetchone()[0]
            return Usage(self._used(), self.bytes_max, count)

    def drop(self, sha256: str, held: list[str]) -> None:
        """Forget a content that turned out to be of no use. `held` are holds of the caller, of
        which those on it end."""
        with self._lock:
            while sha256 in held:
                held.remove(sha256)
                self.release(sha256)
            if not self._holds[sha256]:
                self._drop(sha256)

    def hold(self, sha256: str) -> bool:
        """Keep a content from eviction until `release`. False if it is not here (any more)."""
        with self._lock:
            if self.blob(sha256) is None:
                return False
            self._holds[sha256] += 1
            return True

    def release(self, sha256: str) -> None:
        """Undo one `hold`."""
        with self._lock:
            self._holds[sha256] -= 1
            if self._holds[sha256] <= 0:
                del self._holds[sha256]

    # -- bringing --------------------------------------------------------------------------------

    def draft(self, identity: str) -> Draft:
        """A content on its way, with what an earlier try left of it. One at a time for each
        identity; see `cache.py`."""
        key = hashlib.sha256(identity.encode()).hexdigest()
        with self._lock:
            self._reserved.setdefault(key, 0)
        return Draft(self, identity, key, self.root / "partial" / key)

    def reserve(self, key: str, size: int) -> None:
        """Make room for a partial content of `size` bytes, evicting others.

        Raises TerminalError if it can never fit, CacheFullError if it does not fit now.
        """
        with self._lock:
            if size > self.bytes_max:
                raise TerminalError(
                    f"it has at least {size} bytes, more than the {self.bytes_max} of this node's "
                    "input cache; its operator can raise that with --input-cache",
                    reason="InputTooLarge",
                )
            before = self._reserved.get(key, 0)
            if size > before:
                self._make_room(size - before, key)
                self._reserved[key] = size

    def commit(self, draft: Draft, sha256: str, size: int, note: str) -> Blob:
        """Take a finished draft in. Its file moves."""
        with self._lock, disk("the input cache cannot be written"):
            path = self._path(sha256)
            known = self.blob(sha256)
            if known is None:
                path.parent.mkdir(exist_ok=True, mode=0o700)
                os.chmod(draft.path, 0o444)
                os.replace(draft.path, path)
                self._db.execute(
                    "insert into blobs values (?, ?, ?, ?, ?, 0)",
                    (sha256, size, os.lstat(path).st_mtime_ns, self._tick(), self.boot),
                )
                self._blob_bytes += size
            self.remember(draft.identity, sha256, note)
            draft.discard()
            return Blob(sha256, size, path)

    def adopt(self, path: Path, *, is_executable: bool = False) -> Blob:
        """Take a whole file in, which moves. Its room was reserved by the caller."""
        with disk("the input cache cannot be written"):
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            mode = 0o555 if is_executable else 0o444
            with self._lock:
                size = path.lstat().st_size
                target = self._path(digest)
                if self.blob(digest) is None:
                    target.parent.mkdir(exist_ok=True, mode=0o700)
                    os.chmod(path, mode)
                    os.replace(path, target)
                    self._db.execute(
                        "insert into blobs values (?, ?, ?, ?, ?, 0)",
                        (digest, size, os.lstat(target).st_mtime_ns, self._tick(), self.boot),
                    )
                    self._blob_bytes += size
                elif is_executable:
                    os.chmod(target, mode)
                self._holds[digest] += 1
                return Blob(digest, size, target)

    def remember(self, identity: str, sha256: str, note: str) -> None:
        """Note what a source has now."""
        with self._lock:
            self._db.execute(
                "insert or replace into sources values (?, ?, ?, ?)",
                (identity, sha256, note, self._tick()),
            )

    def note_input(self, key: str, contents: Iterable[Blob]) -> None:
        """Note what an input with this key consists of."""
        with self._lock, disk("the input cache cannot be written"):
            held.note(self._db, key, contents, self._tick())
            self._held = None

    def held_inputs(self) -> tuple[HeldInput, ...]:
        """The inputs of which most is here."""
        with self._lock, disk("the input cache cannot be read"):
            if self._held is None:
                self._held = held.held(self._db)
            return self._held

    # -- giving ----------------------------------------------------------------------------------

    def place(
        self, files: Mapping[str, Blob], into: Path, links: Mapping[str, str] | None = None
    ) -> Path:
        """Link contents into `into/content`, by their paths there; return that directory.
        `links` are symbolic links, whose targets the caller has vetted.

        Once this returns a power failure does not undo it. The caller holds the contents.
        """
        root = into / "content"
        with disk("the inputs cannot be linked"):
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(mode=0o755)
            os.chmod(root, 0o755)  # the process's umask is not for what workloads read
            made = {root}
            for name, blob in files.items():
                target = root / name
                make_parents(target.parent, made)
                link(blob.path, target)
            for name, destination in (links or {}).items():
                make_parents((root / name).parent, made)
                os.symlink(destination, root / name)
            self._flush(files, made)
        return root

    def _flush(self, files: Mapping[str, Blob], made: set[Path]) -> None:
        with self._lock:
            torn = [b for b in {b.sha256: b for b in files.values()}.values() if self._is_torn(b)]
        if len(torn) + len(made) <= _FLUSH_SINGLY_MAX:
            for blob in torn:
                fsync_path(blob.path)
                fsync_path(blob.path.parent)
            for directory in made:
                fsync_path(directory)
        else:
            sync_file_system(self.root)
        with self._lock:
            self._db.executemany(
                "update blobs set durable = 1 where sha256 = ?", [(b.sha256,) for b in torn]
            )

    def _is_torn(self, blob: Blob) -> bool:
        row = self._db.execute(
            "select durable from blobs where sha256 = ?", (blob.sha256,)
        ).fetchone()
        return row is None or not row[0]

    # -- room ------------------------------------------------------------------------------------

    def _used(self) -> int:
        return self._blob_bytes + sum(self._reserved.values())

    def _make_room(self, size: int, key: str) -> None:
        over = self._used() + size - self.bytes_max
        if over <= 0:
            return
        # What was begun and nobody asks for now goes before whole contents.
        for other in [k for k in self._reserved if k != key and not self._is_active(k)]:
            over -= self._forget_partial(other)
        rows = self._db.execute("select sha256, size from blobs order by used").fetchall()
        for sha256, length in rows:
            if over <= 0:
                return
            if not self._holds[sha256] and not self._is_linked(sha256):
                self._drop(sha256)
                over -= length
        if over > 0:
            raise CacheFullError(
                f"{size} more bytes do not fit into this node's input cache of {self.bytes_max} "
                "bytes, whose contents are in use by executions; it is tried again"
            )

    def _is_active(self, key: str) -> bool:
        return self._holds[f"partial {key}"] > 0

    def activate(self, key: str, is_active: bool) -> None:
        """Whether a partial content is being written now."""
        with self._lock:
            if is_active:
                self._holds[f"partial {key}"] += 1
            else:
                del self._holds[f"partial {key}"]

    def _forget_partial(self, key: str) -> int:
        size = self._reserved.pop(key, 0)
        for suffix in ("", ".json"):
            (self.root / "partial" / f"{key}{suffix}").unlink(missing_ok=True)
        return size

    def forget(self, key: str) -> None:
        """A partial content is gone, or became a whole one."""
        with self._lock:
            self._forget_partial(key)

    def settle(self, key: str, size: int) -> None:
        """A partial content rests at so many bytes until somebody asks for it again."""
        with self._lock:
            if key in self._reserved:
                self._reserved[key] = size

    def _is_linked(self, sha256: str) -> bool:
        try:
            return os.lstat(self._path(sha256)).st_nlink > 1
        except OSError:
            return False

    def _drop(self, sha256: str) -> None:
        row = self._db.execute(
            "delete from blobs where sha256 = ? returning size", (sha256,)
        ).fetchone()
        self._blob_bytes -= row[0] if row else 0
        self._held = None
        self._path(sha256).unlink(missing_ok=True)

    # -- small parts -----------------------------------------------------------------------------

    def _path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def _open(self) -> sqlite3.Connection:
        path = self.root / "index.db"
        try:
            return _connect(path)
        except sqlite3.DatabaseError:
            # The index can be lost: contents without it are removed, and fetched again.
            for name in ("index.db", "index.db-wal", "index.db-shm"):
                (self.root / name).unlink(missing_ok=True)
            return _connect(path)

    def _recover(self) -> None:
        """Make the index and the disk agree, after whatever happened."""
        db = self._db
        newest = db.execute("select coalesce(max(used), 0) from blobs").fetchone()[0]
        self._ticks = int(newest) + 1
        db.execute("delete from blobs where durable = 0 and boot <> ?", (self.boot,))
        known = {row[0] for row in db.execute("select sha256 from blobs")}
        there: set[str] = set()
        for directory in (self.root / "blobs").iterdir():
            for path in directory.iterdir():
                if path.name in known:
                    there.add(path.name)
                else:
                    path.unlink(missing_ok=True)
        db.executemany("delete from blobs where sha256 = ?", [(x,) for x in known - there])
        db.execute(
            "delete from sources where sha256 not in (select sha256 from blobs) or identity in "
            "(select identity from sources order by used desc limit -1 offset ?)",
            (_SOURCES_MAX,),
        )
        for path in sorted((self.root / "partial").iterdir()):
            if path.is_dir():  # a tree that was being unpacked
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix != ".json":
                self._reserved[path.name] = path.stat().st_size
            elif path.name.removesuffix(".json") not in self._reserved:
                path.unlink(missing_ok=True)
        total = db.execute("select coalesce(sum(size), 0) from blobs").fetchone()[0]
        self._blob_bytes = int(total)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
    try:
        db.execute("pragma journal_mode = wal")
        # A lost last write costs a fetch, never a wrong content.
        db.execute("pragma synchronous = normal")
        db.executescript(_SCHEMA)
        db.executescript(held.SCHEMA)
        # What it finds it tells; it raises only where it cannot go on.
        if (found := db.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
    except BaseException:
        db.close()
        raise
    return db
