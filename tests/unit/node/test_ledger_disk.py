"""The ledger on disks that are really full or really read-only: file systems of their own, mounted
in a namespace of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SECONDS = 60


def mounted(script: str, place: Path, *mounts: str) -> str:
    """Run a script with `place` as its argument, under mounts that nobody else sees."""
    place.mkdir(exist_ok=True)
    try:
        can = subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(place)],
            check=False, capture_output=True, timeout=SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.fail("this test needs unshare: apt-get install util-linux")
    if can.returncode:
        why = can.stderr.decode().strip()
        pytest.fail(f"this test mounts file systems: run it as root ({why})")
    steps = [*mounts, f'exec {sys.executable} -c "$SCRIPT" {place}']
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    done = subprocess.run(
        ["unshare", "-m", "sh", "-ec", "\n".join(steps)],
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "SCRIPT": HEAD + script, "PYTHONPATH": paths},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HEAD = """
import asyncio, sys
from pathlib import Path
from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_controllers.runner.ledger import *
from tests.unit.node.test_sqlite_ledger import NOW, aside, at, entries

place = Path(sys.argv[1])
path = place / "ledger.db"

def fill(name):
    try:
        with open(place / name, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        pass
"""

FULL = """
async def main():
    ledger = at(path)
    first = await ledger.open()
    await ledger.commit(entries(12))
    await ledger.close()
    fill("others")

    # A machine boots with its disk full: the agent comes up, and can note what it starts.
    ledger = at(path)
    book = await ledger.open()
    assert book.meta.incarnation == first.meta.incarnation
    assert len(book.executions) == 12
    assert not path.with_suffix(".reserve").exists(), "it is what made that possible"
    await ledger.commit(entries(1))
    fill("more")

    # What does not fit any more is refused, whole; what is there stays.
    try:
        for _ in range(1000):
            await ledger.commit(entries(40))
    except LedgerFullError as error:
        assert "the disk is full" in error.message, error.message
    else:
        raise AssertionError("it never was full")
    await ledger.close()
    ledger = at(path)
    book = await ledger.open()
    assert book.meta.incarnation == first.meta.incarnation
    assert set(book.executions) >= {f"uid-e{n}" for n in range(12)}
    assert set(book.executions) == set(book.states)

    # And it passes.
    (place / "others").unlink()
    (place / "more").unlink()
    await ledger.commit(entries(60))
    await ledger.close()
    ledger = at(path)
    assert len((await ledger.open()).executions) >= 60
    assert path.with_suffix(".reserve").stat().st_size > 0, "room is set aside again"
    assert not aside(place)
    await ledger.close()

asyncio.run(main())
"""

READ_ONLY = """
async def main():
    try:
        await at(path).open()
    except LedgerBrokenError as error:
        print(error.message, "|", error.hint)

asyncio.run(main())
"""

WRITE = """
async def main():
    ledger = at(path)
    await ledger.open()
    await ledger.commit(entries(3))
    await ledger.close()

asyncio.run(main())
"""


def test_a_disk_that_is_full_when_the_machine_boots(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    mounted(FULL, place, f"mount -t tmpfs -o size=2m tmpfs {place}")


def test_a_disk_that_is_mounted_read_only(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    mounted(WRITE, place)
    said = mounted(
        READ_ONLY, place, f"mount --bind {place} {place}", f"mount -o remount,ro,bind {place}"
    )
    assert "Read-only file system" in said
    assert "mount it for writing" in said
