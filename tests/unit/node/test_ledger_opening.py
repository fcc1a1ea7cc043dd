"""Opening a ledger that is not as it was left: every kind of harm, and what people are told."""

import asyncio
import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bacalhau.node import ledger as module
from bacalhau_api.errors import BacalhauError
from bacalhau_controllers.runner.ledger import (
    Book,
    LedgerBrokenError,
    LedgerHeldError,
)
from bacalhau_controllers.runner.state import Stage
from tests.unit.node.test_sqlite_ledger import aside, at, entries, is_same, read, written

OLD = Path(__file__).parent / "data" / "ledger-schema-1.db"
ROOT = Path(__file__).parents[3]
TRIALS = 250


async def left_by_a_crash(place: Path, count: int = 12) -> Book:
    """A ledger whose newest commits are in its write-ahead log only."""
    live = place / "live" / "ledger.db"
    ledger = at(live)
    await ledger.open()
    await ledger.commit(entries(count))
    copy = place / "ledger.db"
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{live}{suffix}", f"{copy}{suffix}")
    await ledger.close()
    book = await read(live)
    shutil.rmtree(live.parent)
    assert os.stat(f"{copy}-wal").st_size > 32
    return book


async def test_what_is_in_the_log_only_is_read(tmp_path: Path) -> None:
    before = await left_by_a_crash(tmp_path)
    assert is_same(await read(tmp_path / "ledger.db"), before)
    assert not aside(tmp_path)


@pytest.mark.parametrize("size", [32, 33, 4096, 100_000])
async def test_a_log_of_random_bytes_is_never_passed_over(tmp_path: Path, size: int) -> None:
    before = await left_by_a_crash(tmp_path)
    (tmp_path / "ledger.db-wal").write_bytes(os.urandom(size))
    book = await read(tmp_path / "ledger.db")
    assert book.meta.incarnation != before.meta.incarnation
    assert not book.executions
    kept = aside(tmp_path)
    assert [name.endswith("-wal") for name in kept] == [False, True], "kept together"


async def test_the_log_of_another_ledger_is_not_mixed_in(tmp_path: Path) -> None:
    mine = await left_by_a_crash(tmp_path / "mine")
    other = await left_by_a_crash(tmp_path / "other", count=3)
    shutil.copyfile(tmp_path / "other" / "ledger.db-wal", tmp_path / "mine" / "ledger.db-wal")
    book = await read(tmp_path / "mine" / "ledger.db")
    if book.meta.incarnation == mine.meta.incarnation:
        pytest.fail("its own log is gone, so that this can only be a guess")
    # The foreign log is whole: what it says is that ledger, entirely, or nothing.
    assert is_same(book, other) or not book.executions


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
async def test_a_log_that_is_cut_off_is_a_moment_of_the_past(tmp_path: Path, share: float) -> None:
    """As after a power failure: whole commits, up to some commit."""
    before = await left_by_a_crash(tmp_path)
    log = tmp_path / "ledger.db-wal"
    os.truncate(log, int(log.stat().st_size * share))
    book = await read(tmp_path / "ledger.db")
    assert set(book.executions) in (set(before.executions), set())
    assert set(book.states) == set(book.executions)
    assert set(book.facts) <= set(book.executions)


async def test_damage_anywhere_ends_in_a_moment_of_the_past_or_a_new_ledger(tmp_path: Path) -> None:
    """Also in the log, and in what a checkpoint moved from there into the file."""
    origin = tmp_path / "origin"
    history = await left_by_a_crash_after_commits(origin)
    rng = random.Random(11)
    kinds: Counter[str] = Counter()
    for trial in range(TRIALS):
        place = tmp_path / f"t{trial}"
        shutil.copytree(origin, place)
        harm(place / rng.choice(["ledger.db", "ledger.db-wal"]), rng)
        book = await read(place / "ledger.db")
        if book.meta.incarnation != history[0].meta.incarnation:
            assert not book.executions
            assert aside(place), f"trial {trial}"
            kinds["new"] += 1
        else:
            moment = next((n for n, was in enumerate(history) if is_same(book, was)), None)
            assert moment is not None, f"trial {trial}: what it tells was never so"
            kinds["newest" if moment == len(history) - 1 else "older"] += 1
        shutil.rmtree(place)
    assert min(kinds[one] for one in ("new", "older", "newest")) > TRIALS // 20, kinds


async def left_by_a_crash_after_commits(directory: Path) -> list[Book]:
    """Half of what was committed is in the file, half in its log. What was so after each commit."""
    history = []
    ledger = at(directory / "work" / "ledger.db")
    await ledger.open()
    for number in range(8):
        await ledger.commit(entries(12)[number * 4 : number * 4 + 4])
        moment = directory / "moment"
        shutil.copytree(directory / "work", moment)
        history.append(await read(moment / "ledger.db"))
        shutil.rmtree(moment)
        if number == 3:
            assert ledger._database is not None
            ledger._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for name in ("ledger.db", "ledger.db-wal"):
        shutil.copyfile(directory / "work" / name, directory / name)
    await ledger.close()
    shutil.rmtree(directory / "work")
    return history


def harm(path: Path, rng: random.Random) -> None:
    """Change a file as disks and people do."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    sector = place // 512 * 512
    match rng.randrange(5):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.choice([place, sector, max(0, sector - 1), sector + 1]) :]
        case 2:
            data[sector : sector + 512] = bytes(len(data[sector : sector + 512]))
        case 3:
            other = rng.randrange(len(data)) // 512 * 512
            data[sector : sector + 512], data[other : other + 512] = (
                data[other : other + 512],
                data[sector : sector + 512],
            )
        case _:
            data[place:place] = rng.randbytes(rng.randrange(1, 100))
    path.write_bytes(data)


async def test_an_empty_file_is_a_new_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    path.write_bytes(b"")
    book = await read(path)
    assert book.meta.incarnation != before.meta.incarnation
    assert not book.executions


@pytest.mark.parametrize("size", [1, 100, 511])
async def test_a_file_of_a_few_bytes_is_set_aside(tmp_path: Path, size: int) -> None:
    """SQLite takes the smallest of them for new files."""
    path = tmp_path / "ledger.db"
    before = await written(path)
    os.truncate(path, size)
    book = await read(path)
    assert book.meta.incarnation != before.meta.incarnation
    assert len(aside(tmp_path)) == 1


async def test_an_empty_file_beside_its_log_is_set_aside(tmp_path: Path) -> None:
    """SQLite deletes the log, and nobody hears of what was in it."""
    before = await left_by_a_crash(tmp_path)
    os.truncate(tmp_path / "ledger.db", 0)
    book = await read(tmp_path / "ledger.db")
    assert book.meta.incarnation != before.meta.incarnation
    assert [name.endswith("-wal") for name in aside(tmp_path)] == [False, True]


async def test_a_damaged_schema_whose_names_are_no_text_is_set_aside(tmp_path: Path) -> None:
    """Python cannot read the error with which SQLite refuses it."""
    path = tmp_path / "ledger.db"
    before = await written(path)
    data = path.read_bytes()
    harmed = data.replace(b"tablemetameta", b"table\xff\xfe\xfd\xfcmeta").replace(
        b"CREATE TABLE meta", b"CREATE TABEL meta"
    )
    assert harmed != data
    path.write_bytes(harmed)
    book = await read(path)
    assert book.meta.incarnation != before.meta.incarnation
    assert len(aside(tmp_path)) == 1


async def test_random_bytes_are_set_aside_and_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    path.write_bytes(os.urandom(50_000))
    ledger = at(path)
    book = await ledger.open()
    assert book.meta.incarnation != before.meta.incarnation
    files = ledger.files()
    assert files.set_aside == tuple(aside(tmp_path))
    assert len(files.set_aside) == 1
    assert files.size_bytes > 0
    assert files.schema_version == len(module.MIGRATIONS)
    await ledger.close()


async def test_a_directory_in_its_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    (path / "what").mkdir(parents=True)
    with pytest.raises(LedgerBrokenError, match="cannot be opened") as caught:
        await at(path).open()
    assert "move that away" in caught.value.hint
    assert (path / "what").is_dir()


async def test_a_ledger_in_use_names_who_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    first = at(path)
    await first.open()
    with pytest.raises(LedgerHeldError, match=f"process {os.getpid()}"):
        await at(path).open()
    await first.close()


async def test_a_disk_that_cannot_be_written_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await written(tmp_path / "ledger.db")
    real = os.open

    def refuse(path: str, flags: int, *more: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LedgerBrokenError, match="Read-only") as caught:
        await at(tmp_path / "ledger.db").open()
    assert "mount it for writing" in caught.value.hint
    monkeypatch.undo()
    assert not aside(tmp_path)


OPENER = """
import asyncio, os, sys
from pathlib import Path
from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import BacalhauError

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(SqliteLedger(Path(sys.argv[1]), SystemClock(), SystemIds()).open())
except BacalhauError as error:
    print(f"{type(error).__name__}|{error.message}|{error.hint}")
"""


def test_the_ledger_of_another_user_is_said_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    before = asyncio.run(written(path))
    os.chmod(path, 0o400 if os.geteuid() else 0o600)
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_uid == os.geteuid() and part != Path("/"):
            os.chmod(part, part.stat().st_mode | 0o011)
    os.chmod(path.with_suffix(".lock"), 0o666)
    environment = {
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "api", "controllers")),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", OPENER, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd="/",
    )
    kind, message, hint = done.stdout.strip().split("|")
    assert kind == "LedgerBrokenError"
    assert "cannot be opened" in message
    assert f"it belongs to user {os.geteuid()}" in hint
    os.chmod(path, 0o600)
    assert is_same(asyncio.run(read(path)), before), "and nothing was touched"


# -- versions --------------------------------------------------------------------------------------


async def test_a_ledger_of_the_first_version_can_be_read(tmp_path: Path) -> None:
    """The file was written by `tests/support/old_ledger.py` when schema 1 was the newest. Whatever
    comes later reads it."""
    path = tmp_path / "ledger.db"
    shutil.copyfile(OLD, path)
    book = await read(path)
    assert not aside(tmp_path)
    assert book.meta.incarnation == "the-first-ledger"
    assert {state.stage for state in book.states.values()} == set(Stage) - {Stage.GONE}
    assert len(book.executions) == len(book.states)
    assert len(book.publications) == len(book.publication_states) == 2
    assert len(book.facts) == 3
    assert max(fact.seq for fact in book.facts.values()) <= book.meta.facts_seq


async def test_an_old_ledger_is_brought_to_a_later_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    shutil.copyfile(OLD, path)
    before = await read(path)
    later = "ALTER TABLE outbox ADD COLUMN note TEXT NOT NULL DEFAULT ''"
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, later))
    assert is_same(await read(path), before)
    database = sqlite3.connect(path)
    number = len(module.MIGRATIONS)
    assert database.execute("PRAGMA user_version").fetchone() == (number,)
    assert database.execute("SELECT count(*) FROM outbox WHERE note = ''").fetchone() == (3,)
    database.close()


async def test_a_newer_ledger_is_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.db"
    before = await written(path)
    with monkeypatch.context() as newer:
        newer.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "CREATE TABLE later (x)"))
        await read(path)
    with pytest.raises(BacalhauError, match="newer version") as caught:
        await at(path).open()
    assert "upgrade bacalhau" in caught.value.hint
    assert not aside(tmp_path)
    with monkeypatch.context() as newer:
        newer.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "CREATE TABLE later (x)"))
        assert is_same(await read(path), before), "it is as the newer version left it"


def test_the_agent_ends_with_the_message_and_no_traceback(tmp_path: Path) -> None:
    """What all of the above comes to for whoever starts the agent."""
    (tmp_path / "data" / "node" / "ledger.db").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "bacalhau", "serve", "--data-dir", str(tmp_path / "data"),
         "--port", "0", "--nats-port", "-1"],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/api:{ROOT}/controllers"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: the ledger" in done.stderr
    assert "hint: something else is in its place" in done.stderr
    assert "Part of the process failed" in done.stderr
    assert "Traceback" not in done.stderr
