"""The ledger on disk: damage, full disks, kills, and who may read it."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bacalhau.node import ledger as module
from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.v1.execution import Phase, Report
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.ledger import (
    AckFacts,
    Book,
    Entry,
    LedgerBrokenError,
    LedgerFullError,
    PutContact,
    PutExecution,
    PutFact,
    PutState,
)
from bacalhau_controllers.runner.state import Instant, new_state
from tests.support.runner import execution
from tests.support.simclock import EPOCH

NOW = Instant(wall=EPOCH, mono=1.0, boot="b")


def at(path: Path) -> SqliteLedger:
    return SqliteLedger(path, SystemClock(), SystemIds())


def entries(count: int) -> list[Entry]:
    found: list[Entry] = [PutContact(NOW)]
    for number in range(count):
        one = execution(f"e{number}")
        uid = one.metadata.uid
        report = Report(step=1, incarnation="i", phase=Phase.RUNNING)
        found += [
            PutExecution(one),
            PutState(uid, new_state("i", NOW)),
            PutFact(
                Fact(seq=number + 1, namespace="default", name=one.name, uid=uid, execution=report)
            ),
        ]
    return found


async def written(path: Path, count: int = 12) -> Book:
    ledger = at(path)
    await ledger.open()
    await ledger.commit(entries(count))
    await ledger.close()
    book = await ledger.open()
    await ledger.close()
    return book


async def read(path: Path) -> Book:
    ledger = at(path)
    try:
        return await ledger.open()
    finally:
        await ledger.close()


def aside(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.corrupt-*"))


def is_same(a: Book, b: Book) -> bool:
    return (a.meta, a.executions, a.states, list(a.facts.items())) == (
        b.meta,
        b.executions,
        b.states,
        list(b.facts.items()),
    )


async def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    ledger = at(tmp_path / "n" / "ledger.db")
    await ledger.open()
    await ledger.commit(entries(1))
    for path in (tmp_path / "n").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE((tmp_path / "n").stat().st_mode) == 0o700
    await ledger.close()


async def test_every_commit_is_flushed(tmp_path: Path) -> None:
    ledger = at(tmp_path / "ledger.db")
    await ledger.open()
    database = ledger._database
    assert database is not None
    assert database.execute("PRAGMA synchronous").fetchone() == (2,)
    assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await ledger.close()


async def test_damage_is_set_aside_and_begun_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    path.write_bytes(b"this is no database, it is a text that is long enough to be one" * 100)
    book = await read(path)
    assert book.meta.incarnation != before.meta.incarnation
    assert not book.executions
    assert len(aside(tmp_path)) == 1
    assert "Set a damaged ledger aside" in caplog.text
    path.write_bytes(b"again no database" * 1000)
    await read(path)
    assert len(aside(tmp_path)) == 2  # the first is kept, too


async def test_bit_flips_are_never_believed(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    before = await written(origin / "ledger.db")
    size = (origin / "ledger.db").stat().st_size
    rng = random.Random(7)
    noticed = 0
    for trial in range(300):
        place = tmp_path / f"t{trial}"
        shutil.copytree(origin, place)
        data = bytearray((place / "ledger.db").read_bytes())
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        (place / "ledger.db").write_bytes(data)
        book = await read(place / "ledger.db")
        if book.meta.incarnation == before.meta.incarnation:
            assert is_same(book, before), f"trial {trial}"
        else:
            noticed += 1
            assert not book.executions
            assert aside(place)
        shutil.rmtree(place)
    assert noticed > 30  # the rest hit unused space


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 0.999])
async def test_truncation_is_never_believed(tmp_path: Path, share: float) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    os.truncate(path, int(path.stat().st_size * share))
    book = await read(path)
    assert book.meta.incarnation != before.meta.incarnation
    assert not book.executions


async def test_a_zeroed_page_is_never_believed(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    before = await written(origin / "ledger.db")
    pages = (origin / "ledger.db").stat().st_size // 4096
    for page in range(pages):
        place = tmp_path / f"p{page}"
        shutil.copytree(origin, place)
        with (place / "ledger.db").open("r+b") as file:
            file.seek(page * 4096)
            file.write(bytes(4096))
        book = await read(place / "ledger.db")
        assert book.meta.incarnation != before.meta.incarnation or is_same(book, before)


async def test_a_row_that_was_changed_by_hand_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    database = sqlite3.connect(path)
    with database:
        database.execute("UPDATE objects SET body = replace(body, 'e1', 'e2') WHERE number = 3")
    database.close()
    assert (await read(path)).meta.incarnation != before.meta.incarnation


async def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    database = sqlite3.connect(path)
    with database:
        database.execute("CREATE TABLE theirs (x)")
        database.execute("INSERT INTO theirs VALUES (1)")
    database.close()
    book = await read(path)
    assert book.meta.incarnation
    (kept,) = (tmp_path / name for name in aside(tmp_path))
    database = sqlite3.connect(kept)
    assert database.execute("SELECT x FROM theirs").fetchall() == [(1,)]
    database.close()


async def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    database = sqlite3.connect(path)
    with database:
        database.execute("PRAGMA user_version = 2")
        database.execute("INSERT INTO migrations VALUES (2, 'later')")
    database.close()
    with pytest.raises(LedgerBrokenError, match="newer version"):
        await read(path)
    database = sqlite3.connect(path)
    with database:
        database.execute("PRAGMA user_version = 1")
        database.execute("DELETE FROM migrations WHERE version = 2")
    database.close()
    assert is_same(await read(path), before)


async def test_a_migration_is_applied_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    more = (*module.MIGRATIONS, "CREATE TABLE later (x); CREATE INDEX later_x ON later (x);")
    monkeypatch.setattr(module, "MIGRATIONS", (*more[:1], "CREATE TABLE later (x); no sql;"))
    with pytest.raises(LedgerBrokenError, match="cannot be brought to schema 2"):
        await read(path)  # a mistake of ours costs nobody the ledger, and nothing is half done
    assert not aside(tmp_path)
    monkeypatch.setattr(module, "MIGRATIONS", more)
    assert is_same(await read(path), before)
    assert is_same(await read(path), before)
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA user_version").fetchone() == (2,)
    assert database.execute("SELECT version FROM migrations").fetchall() == [(1,), (2,)]
    database.close()


async def test_a_full_disk_changes_nothing_and_passes(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = at(path)
    await ledger.open()
    await ledger.commit(entries(3))
    assert ledger._database is not None
    ledger._database.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerFullError, match="disk is full"):
        await ledger.commit(entries(500))
    ledger._database.execute("PRAGMA max_page_count = 1000000")
    await ledger.commit([AckFacts(1)])
    await ledger.close()
    book = await read(path)
    assert len(book.executions) == 3
    assert len(book.facts) == 2


async def test_a_locked_ledger_is_tried_again_later(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    ledger = at(path)
    await ledger.open()
    assert ledger._database is not None
    ledger._database.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerFullError, match="locked"):
        await ledger.commit(entries(1))
    other.execute("ROLLBACK")
    other.close()
    await ledger.commit(entries(1))
    await ledger.close()


async def test_an_unreadable_directory_is_said_clearly(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(LedgerBrokenError, match="cannot be opened"):
        await at(blocker / "ledger.db").open()


WRITER = """
import asyncio, sys
from pathlib import Path
from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_controllers.runner.ledger import PutExecution, PutState
from bacalhau_controllers.runner.state import Instant, new_state
from tests.support.runner import execution
from tests.support.simclock import EPOCH

async def main():
    ledger = SqliteLedger(Path(sys.argv[1]), SystemClock(), SystemIds())
    await ledger.open()
    state = new_state("i", Instant(wall=EPOCH, mono=1.0, boot="b"))
    for number in range(100000):
        one = execution(f"e{number}")
        await ledger.commit([PutExecution(one), PutState(one.metadata.uid, state)])
        print(number, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("count", [1, 40, 150])
def test_a_killed_writer_loses_nothing_that_was_committed(tmp_path: Path, count: int) -> None:
    path = tmp_path / "ledger.db"
    root = Path(__file__).parents[3]
    environment = {
        "PYTHONPATH": os.pathsep.join(str(root / p) for p in (".", "api", "controllers"))
    }
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment, cwd=root
    )
    assert process.stdout is not None
    last = -1
    while last < count:
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    for line in process.stdout:
        last = int(line)
    process.stdout.close()
    process.wait()
    book = asyncio.run(read(path))  # its lock is gone with it
    assert len(book.executions) == len(book.states)
    assert len(book.executions) >= last + 1
    assert not aside(tmp_path)
