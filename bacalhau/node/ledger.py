"""The node's ledger in SQLite: one file, one writer, every commit flushed to the disk.

Each row carries a checksum, so that a flipped bit is noticed and not believed. A file that cannot
be trusted is set aside under another name and a new ledger is begun, with a new incarnation: the
orchestrator then learns that this node no longer knows what it had begun.
"""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from bacalhau.remedies import remedy
from bacalhau_api.base import Model
from bacalhau_api.v1.execution import Execution, ExecutionStatus, Publication, PublicationStatus
from bacalhau_api.wire import Fact
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.runner.ledger import (
    AckFacts,
    Book,
    DropFact,
    Entry,
    Forget,
    LedgerBrokenError,
    LedgerFullError,
    LedgerHeldError,
    Meta,
    PublicationState,
    PutContact,
    PutExecution,
    PutFact,
    PutPublication,
    PutPublicationState,
    PutState,
)
from bacalhau_controllers.runner.state import RunnerState

logger = logging.getLogger(__name__)

T = TypeVar("T")

APPLICATION_ID: Final = 0x42634C67
"""Marks the file as a ledger of this project (`BcLg`)."""

MIGRATIONS: Final = (
    """
    CREATE TABLE migrations (version INTEGER PRIMARY KEY, applied TEXT NOT NULL);
    CREATE TABLE meta (one INTEGER PRIMARY KEY CHECK (one = 1), body TEXT NOT NULL,
                       sum INTEGER NOT NULL);
    CREATE TABLE objects (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, uid TEXT NOT NULL,
                          body TEXT NOT NULL, sum INTEGER NOT NULL, UNIQUE (kind, uid));
    CREATE TABLE outbox (seq INTEGER PRIMARY KEY, uid TEXT NOT NULL UNIQUE, body TEXT NOT NULL,
                         sum INTEGER NOT NULL);
    """,
)
"""Statement lists, one per schema version. Only ever appended to."""

RESERVE_BYTES: Final = 512 * 1024
RESERVE_PAUSE_COMMITS: Final = 100
"""After a full disk, so many commits have to succeed before room is set aside again."""

EXECUTION, STATE = "execution", "state"
PUBLICATION, PROGRESS = "publication", "progress"

_PAGE_BYTES_MIN: Final = 512
_LOG_HEADER_BYTES: Final = 32
_LOG_MAGIC: Final = (0x377F0682, 0x377F0683)

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_NO_ROOM = {
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_READONLY: "the disk is mounted read-only",
    sqlite3.SQLITE_BUSY: "another program holds the ledger locked",
    sqlite3.SQLITE_LOCKED: "another program holds the ledger locked",
}


@dataclass(frozen=True, slots=True)
class LedgerFiles:
    """The ledger as files. `set_aside` are the damaged ones that it replaced, oldest first."""

    path: Path
    size_bytes: int
    schema_version: int
    set_aside: tuple[str, ...]


class _DamagedError(Exception):
    """What is in the file cannot be trusted."""


class SqliteLedger:
    """A Ledger in the file `path`. See `bacalhau_controllers.runner.ledger.Ledger`.

    SQLite blocks while it flushes, so all of it happens in one thread of its own.
    """

    def __init__(self, path: Path, clock: Clock, ids: Ids) -> None:
        self._path = path
        self._clock = clock
        self._ids = ids
        self._database: sqlite3.Connection | None = None
        self._lock_file: int | None = None
        self._commits_until_reserve = 0
        self._is_alone = False
        self._meta = Meta(incarnation="")
        self._thread: ThreadPoolExecutor | None = None

    async def open(self) -> Book:
        """See Ledger."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        try:
            return await self._call(self._open)
        except BaseException:
            await self.close()
            raise

    async def commit(self, entries: Sequence[Entry]) -> None:
        """See Ledger."""
        await self._call(self._commit, entries)

    def files(self) -> LedgerFiles:
        """What is on the disk now. Takes a few calls of the file system, and never waits."""
        size = _size(self._path) + _size(f"{self._path}-wal")
        with contextlib.suppress(OSError):
            names = sorted(
                entry.name
                for entry in os.scandir(self._path.parent)
                if entry.name.startswith(f"{self._path.stem}.corrupt-")
                and not entry.name.endswith(("-wal", "-shm"))
            )
            return LedgerFiles(self._path, size, len(MIGRATIONS), tuple(names))
        return LedgerFiles(self._path, size, len(MIGRATIONS), ())

    async def close(self) -> None:
        """See Ledger."""
        if self._thread is not None:
            await self._call(self._close)
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        if self._thread is None:
            raise LedgerBrokenError("the ledger is not open")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    # -- in the thread: opening ------------------------------------------------------------------

    def _open(self) -> Book:
        try:
            with _translated(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._hold()
                return self._open_with_room()
        except LedgerFullError as error:
            # While it runs, the agent waits for room; it does not begin without having read all.
            raise LedgerBrokenError(error.message, hint=error.hint) from error

    def _open_with_room(self) -> Book:
        try:
            book = self._open_or_replace()
        except (sqlite3.Error, OSError) as error:
            if not _may_lack_room(error):
                raise
            # As if the disk is full. The shared memory, by which other programs can look at the
            # ledger meanwhile, is a file, too: without them it is not needed.
            self._spend_reserve()
            self._is_alone = True
            self._commits_until_reserve = RESERVE_PAUSE_COMMITS
            return self._open_or_replace()
        self._keep_reserve()
        return book

    @property
    def _reserve(self) -> Path:
        return self._path.with_suffix(".reserve")

    def _keep_reserve(self) -> None:
        """Set some room aside. On a disk that others have filled, it lets the agent write down how
        things ended, and start again what a boot has cut."""
        try:
            file = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, RESERVE_BYTES)
            finally:
                os.close(file)
        except OSError:
            self._spend_reserve()  # half of it helps nobody

    def _spend_reserve(self) -> bool:
        """Give that room back. False if there was none."""
        try:
            spent = self._reserve.stat().st_size > 0
            self._reserve.unlink()
        except OSError:
            return False
        return spent

    def _open_or_replace(self) -> Book:
        try:
            self._check_size()
            self._check_log()
            return self._open_file()
        except _DamagedError as damage:
            self._set_aside(str(damage))
            try:
                return self._open_file()
            except _DamagedError as again:
                raise LedgerBrokenError(f"a new ledger cannot be made: {again}") from again

    def _check_size(self) -> None:
        """SQLite takes a file that was cut off for a new one, and deletes the log beside it. A file
        of ours is empty only until it has its first page, and has no log until then. Raises
        _DamagedError."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if 0 < size < _PAGE_BYTES_MIN or (size == 0 and _size(f"{self._path}-wal")):
            raise _DamagedError(f"it was cut off: {size} bytes are left")

    def _check_log(self) -> None:
        """SQLite passes over a write-ahead log that is none, and shows what was true some time ago.
        Work must not be taken up from there. Raises _DamagedError.

        A log that is missing cannot be told from one that was checkpointed. Then the ledger is an
        older copy, which the orchestrator notices by the steps of its reports.
        """
        try:
            with open(f"{self._path}-wal", "rb") as log:
                header = log.read(_LOG_HEADER_BYTES)
        except FileNotFoundError:
            return
        # A crash may leave it empty, but its header is written in one sector.
        is_whole = len(header) == _LOG_HEADER_BYTES
        if is_whole and int.from_bytes(header[:4], "big") not in _LOG_MAGIC:
            raise _DamagedError("its write-ahead log is not one")

    def _hold(self) -> None:
        """Make sure that no other agent uses this ledger, for as long as this process lives."""
        lock = os.open(
            self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 32).decode("ascii", "replace").strip()
            os.close(lock)
            who = f"process {holder}" if holder else "another process"
            raise LedgerHeldError(
                f"the ledger {self._path} is in use by {who}",
                hint="stop that agent, or give this one another data directory",
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        self._lock_file = lock

    def _open_file(self) -> Book:
        # Made by us, so that nobody else can read it, nor what SQLite makes beside it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(self._path, 0o600)
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            with _noticing_damage():
                return self._begin(database)
        except BaseException:
            database.close()
            raise

    def _begin(self, database: sqlite3.Connection) -> Book:
        database.text_factory = _text
        if self._is_alone:
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA trusted_schema = OFF")
        database.execute("PRAGMA cell_size_check = ON")
        database.execute("PRAGMA busy_timeout = 2000")
        found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _DamagedError(str(found))
        application = database.execute("PRAGMA application_id").fetchone()[0]
        tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if application != APPLICATION_ID and (application or tables):
            raise _DamagedError("it is a database of another program")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            applied = database.execute("SELECT max(version) FROM migrations").fetchone()[0]
            if applied != version:  # a flipped bit, not a newer version's doing
                raise _DamagedError(f"its schema is {version}, but {applied} was applied")
            raise LedgerBrokenError(
                f"the ledger {self._path} was written by a newer version (schema {version}, this "
                f"one knows {len(MIGRATIONS)})",
                hint="upgrade bacalhau on this node",
            )
        database.execute("PRAGMA journal_mode = WAL")
        # FULL flushes the log at each commit: what was committed survives a power failure.
        database.execute("PRAGMA synchronous = FULL")
        self._migrate(database, version)
        book = _load(database)
        self._meta = book.meta
        self._database = database
        return book

    def _migrate(self, database: sqlite3.Connection, version: int) -> None:
        for number in range(version, len(MIGRATIONS)):
            with _transaction(database):
                self._migrate_one(database, number)

    def _migrate_one(self, database: sqlite3.Connection, number: int) -> None:
        try:
            for statement in MIGRATIONS[number].split(";"):
                database.execute(statement)
        except sqlite3.Error as error:
            if number == 0 or _code(error) != sqlite3.SQLITE_ERROR:
                raise
            # The ledger is sound; it is the migration that does not fit. Nothing was changed.
            raise LedgerBrokenError(
                f"the ledger {self._path} cannot be brought to schema {number + 1}: {error}"
            ) from error
        if number == 0:
            _put_meta(database, Meta(incarnation=self._ids.uid(), created=self._clock.now()))
        database.execute(
            "INSERT INTO migrations VALUES (?, ?)", (number + 1, self._clock.now().isoformat())
        )
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {number + 1}")

    def _set_aside(self, damage: str) -> None:
        """Keep the damaged files for people to look at, out of the way."""
        stamp = self._clock.now().strftime("%Y%m%dT%H%M%SZ")
        aside = self._path.with_name(f"{self._path.stem}.corrupt-{stamp}")
        number = 1
        while aside.exists():
            aside = self._path.with_name(f"{self._path.stem}.corrupt-{stamp}-{number}")
            number += 1
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(f"{self._path}{suffix}", f"{aside}{suffix}")
        logger.error(
            "Set a damaged ledger aside and began a new one; what this node had begun is reported "
            "as lost",
            extra={"damage": damage, "kept_as": str(aside)},
        )

    def _close(self) -> None:
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):
                self._database.close()
            self._database = None
        if self._lock_file is not None:
            os.close(self._lock_file)
            self._lock_file = None

    # -- in the thread: writing ------------------------------------------------------------------

    def _commit(self, entries: Sequence[Entry]) -> None:
        database = self._database
        if database is None:
            raise LedgerBrokenError("the ledger is not open")
        meta = self._meta
        try:
            with _translated(self._path), _transaction(database):
                for entry in entries:
                    meta = _write(database, entry, meta)
                if meta != self._meta:
                    _put_meta(database, meta)
        except LedgerFullError:
            # For the tries that follow; what could not be written now is refused all the same, so
            # that the node takes on nothing new.
            self._spend_reserve()
            self._commits_until_reserve = RESERVE_PAUSE_COMMITS
            raise
        self._meta = meta
        if self._commits_until_reserve:
            self._commits_until_reserve -= 1
            if not self._commits_until_reserve:
                self._keep_reserve()


def _write(database: sqlite3.Connection, entry: Entry, meta: Meta) -> Meta:
    match entry:
        case PutContact(contact):
            return meta.but(contact=contact)
        case PutExecution(execution):
            bare = execution.but(status=ExecutionStatus())
            _put(database, EXECUTION, execution.metadata.uid, bare)
        case PutState(uid, state):
            _put(database, STATE, uid, state)
        case PutPublication(publication):
            bare_one = publication.but(status=PublicationStatus())
            _put(database, PUBLICATION, publication.metadata.uid, bare_one)
        case PutPublicationState(uid, progress):
            _put(database, PROGRESS, uid, progress)
        case Forget(uid):
            database.execute("DELETE FROM objects WHERE uid = ?", (uid,))
            database.execute("DELETE FROM outbox WHERE uid = ?", (uid,))
        case PutFact(fact):
            body = fact.encode().decode()
            database.execute("DELETE FROM outbox WHERE uid = ?", (fact.uid,))
            database.execute(
                "INSERT INTO outbox VALUES (?, ?, ?, ?)",
                (fact.seq, fact.uid, body, _sum("fact", fact.uid, body)),
            )
            return meta.but(facts_seq=max(meta.facts_seq, fact.seq))
        case AckFacts(seq):
            database.execute("DELETE FROM outbox WHERE seq <= ?", (seq,))
            return meta.but(facts_acked=max(meta.facts_acked, seq))
        case DropFact(uid, seq):
            database.execute(
                "DELETE FROM outbox WHERE uid = ?1 AND (?2 IS NULL OR seq = ?2)", (uid, seq)
            )
    return meta


def _put(database: sqlite3.Connection, kind: str, uid: str, model: Model) -> None:
    body = model.encode().decode()
    database.execute(
        "INSERT INTO objects (kind, uid, body, sum) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (kind, uid) DO UPDATE SET body = excluded.body, sum = excluded.sum",
        (kind, uid, body, _sum(kind, uid, body)),
    )


def _put_meta(database: sqlite3.Connection, meta: Meta) -> None:
    body = meta.encode().decode()
    database.execute(
        "INSERT INTO meta VALUES (1, ?, ?) "
        "ON CONFLICT (one) DO UPDATE SET body = excluded.body, sum = excluded.sum",
        (body, _sum("meta", "", body)),
    )


def _load(database: sqlite3.Connection) -> Book:
    """Everything, each row checked. Raises _DamagedError."""
    rows = database.execute("SELECT body, sum FROM meta").fetchall()
    if len(rows) != 1:
        raise _DamagedError("the record of the node is missing")
    book = Book(_checked(Meta, "meta", "", *rows[0]))
    models: dict[str, tuple[type[Model], dict[str, Any]]] = {
        EXECUTION: (Execution, book.executions),
        STATE: (RunnerState, book.states),
        PUBLICATION: (Publication, book.publications),
        PROGRESS: (PublicationState, book.publication_states),
    }
    query = "SELECT kind, uid, body, sum FROM objects ORDER BY number"
    for kind, uid, body, total in database.execute(query):
        if kind not in models:
            raise _DamagedError(f"it has a record of the unknown kind {kind!r}")
        model, records = models[kind]
        records[uid] = _checked(model, kind, uid, body, total)
    query = "SELECT seq, uid, body, sum FROM outbox ORDER BY seq"
    for seq, uid, body, total in database.execute(query):
        fact = _checked(Fact, "fact", uid, body, total)
        if fact.seq != seq or seq > book.meta.facts_seq:
            raise _DamagedError(f"fact {seq} has the number {fact.seq}")
        book.facts[uid] = fact
    return book


ModelT = TypeVar("ModelT", bound=Model)


def _checked(model: type[ModelT], kind: str, uid: object, body: object, total: object) -> ModelT:
    if not isinstance(body, str) or not isinstance(uid, str) or total != _sum(kind, uid, body):
        raise _DamagedError(f"the checksum of {kind} {uid!r} is wrong")
    try:
        return model.decode(body)
    except ValidationError as error:
        # Written by us and unharmed, yet not understood: not damage, but a mistake of ours.
        raise LedgerBrokenError(
            f"{kind} {uid} in the ledger cannot be read by this version: {error}"
        ) from error


def _sum(kind: str, uid: str, body: str) -> int:
    return zlib.crc32(f"{kind}\0{uid}\0{body}".encode("utf-8", "surrogateescape"))


def _text(data: bytes) -> str:
    """Whatever bytes are there: a checksum, not an exception, says that they are wrong."""
    return data.decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors (a full disk); then this says so.
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _noticing_damage() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        # SQLite names what it found in a damaged schema, and Python cannot read it.
        raise _DamagedError(f"malformed database schema: {error}") from error
    except sqlite3.DatabaseError as error:
        if _code(error) in _DAMAGED:
            raise _DamagedError(str(error)) from error
        if isinstance(error, sqlite3.OperationalError) and _code(error) == sqlite3.SQLITE_ERROR:
            # A statement of ours that does not fit the tables found: not the tables we made.
            raise _DamagedError(str(error)) from error
        raise


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Say what went wrong in the ledger's own errors."""
    try:
        yield
    except sqlite3.Error as error:
        reason = _NO_ROOM.get(_code(error))
        if reason is not None:
            raise LedgerFullError(f"the ledger {path} cannot be written: {reason}") from error
        # An error of the disk, or of a flush, may have lost something already: only a new start
        # that reads everything again can tell.
        raise LedgerBrokenError(f"the ledger {path} failed: {error}") from error
    except OSError as error:
        message = f"the ledger {path} cannot be opened: {error}"
        raise LedgerBrokenError(message, hint=remedy(path, error)) from error


def _size(path: Path | str) -> int:
    """In bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _may_lack_room(error: sqlite3.Error | OSError) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # What SQLite cannot make or extend beside the file comes as one of the other two.
    return _code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 if it came from elsewhere."""
    return int(getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
