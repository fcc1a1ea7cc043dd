"""Contents on the node's disk, each once and named by its SHA-256, bounded in bytes.

    <root>/blobs/<2 digits>/<sha256>    whole contents, read-only
    <root>/partial/<key>[.json]         contents on their way, and how far they are safely on disk
    <root>/index.db                     sizes, order of use, and what each source had last time

An execution gets hard links in a directory of its own, mounted read-only. So the file system counts
who uses what: a content may be evicted only while the cache alone holds it, and no crash can leave
a use behind that nobody has. What is evicted first is what was used longest ago.

Blocking and thread-safe. Who waits for whom is in `cache.py`.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from bacalhau_api.errors import TerminalError, TransientError

FLUSH_BYTES: Final = 256 * 1024 * 1024
"""Of a long transfer, between two points from which it could go on after a power failure."""

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
        self._boot = boot
        self._lock = threading.RLock()
        self._holds: Counter[str] = Counter()
        self._reserved: dict[str, int] = {}
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

    def draft(self, identity: str) -> "Draft":
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

    def commit(self, draft: "Draft", sha256: str, size: int, note: str) -> Blob:
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
                    (sha256, size, os.lstat(path).st_mtime_ns, self._tick(), self._boot),
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
                        (digest, size, os.lstat(target).st_mtime_ns, self._tick(), self._boot),
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
                _make_parents(target.parent, made)
                _link(blob.path, target)
            for name, destination in (links or {}).items():
                _make_parents((root / name).parent, made)
                os.symlink(destination, root / name)
            self._flush(files, made)
        return root

    def _flush(self, files: Mapping[str, Blob], made: set[Path]) -> None:
        with self._lock:
            torn = [b for b in {b.sha256: b for b in files.values()}.values() if self._is_torn(b)]
        if len(torn) + len(made) <= _FLUSH_SINGLY_MAX:
            for blob in torn:
                _fsync(blob.path)
                _fsync(blob.path.parent)
            for directory in made:
                _fsync(directory)
        else:
            _sync_file_system(self.root)
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
        db.execute("delete from blobs where durable = 0 and boot <> ?", (self._boot,))
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


class Draft:
    """One content on its way: bytes are appended, hashed on the way, and can be gone on with.

    Used by one thread at a time. `begin` first, then `write`, then `finish`.
    """

    def __init__(self, store: ContentStore, identity: str, key: str, path: Path) -> None:
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
                self._note(self.size_bytes if kept else 0)
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
            return size if note["boot"] == self._store._boot else min(size, int(note["flushed"]))
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
    def store(self) -> ContentStore:
        """Where it is going."""
        return self._store

    @property
    def _side(self) -> Path:
        return self.path.with_name(f"{self._key}.json")

    def _note(self, flushed: int) -> None:
        self._flushed = flushed
        text = json.dumps(
            {"validator": self._validator, "flushed": flushed, "boot": self._store._boot}
        )
        fresh = self._side.with_suffix(".new.json")
        fresh.write_text(text)
        os.replace(fresh, self._side)


def check_tree_path(name: str) -> str:
    """A relative path for `place`, made from a stranger's name of a file. Raises ValueError."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts):
        raise ValueError("it cannot be the path of a file")
    if any(len(part.encode("utf-8", "replace")) > 255 for part in parts) or len(parts) > 64:
        raise ValueError("it is too long for the path of a file")
    if "\0" in name or len(name.encode("utf-8", "replace")) > 2048:
        raise ValueError("it cannot be the path of a file")
    try:
        name.encode()
    except UnicodeError:
        raise ValueError("it is not valid text") from None
    return str(PurePosixPath(name))


@contextlib.contextmanager
def disk(what: str) -> Iterator[None]:
    """Say what the disk refused in the project's errors."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise TransientError(f"{what}: {why}", reason="Disk") from error
    except sqlite3.Error as error:
        raise TransientError(f"{what}: {error}", reason="Disk") from error


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
    try:
        db.execute("pragma journal_mode = wal")
        # A lost last write costs a fetch, never a wrong content.
        db.execute("pragma synchronous = normal")
        db.executescript(_SCHEMA)
        db.execute("pragma quick_check").fetchone()
    except BaseException:
        db.close()
        raise
    return db


def _make_parents(directory: Path, made: set[Path]) -> None:
    missing = []
    while directory not in made:
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(mode=0o755)
        os.chmod(path, 0o755)
        made.add(path)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
            raise
        # No (more) links here: a copy costs room, but is right.
        shutil.copyfile(source, target, follow_symlinks=False)
        os.chmod(target, 0o444)
        _fsync(target)


def _fsync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_file_system(path: Path) -> None:
    """Flush everything on the file system at once: far cheaper than thousands of single files."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        if sync is None:
            os.sync()
        elif sync(file) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(file)
