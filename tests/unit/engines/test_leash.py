"""The record of the last contact."""

import os
import time
from pathlib import Path

import pytest

from bacalhau.engines.leash import Watch, note, read


def test_what_is_noted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "contact"
    assert read(path) is None
    note(path, "boot-1", 12.5)
    assert read(path) == ("boot-1", 12.5)
    note(path, "b", 123456.789)
    assert read(path) == ("b", 123456.789)


def test_is_written_in_place(tmp_path: Path) -> None:
    """Else it could not be written on a full disk."""
    path = tmp_path / "contact"
    note(path, "boot-1", 1.0)
    before = path.stat()
    note(path, "boot-1", 99999999.5)
    after = path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


@pytest.mark.parametrize("spoilt", [b"", b"\0" * 128, b"boot-1 99.0 00000000", b"x", b"a b c d"])
def test_nonsense_is_nothing(tmp_path: Path, spoilt: bytes) -> None:
    path = tmp_path / "contact"
    path.write_bytes(spoilt)
    assert read(path) is None


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "contact"
    note(path, "boot-1", 12.5)
    whole = path.read_bytes()
    for place in range(len(whole.rstrip())):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read(path) in (None, ("boot-1", 12.5)), place


def test_does_not_follow_a_link(tmp_path: Path) -> None:
    os.symlink(tmp_path / "elsewhere", tmp_path / "contact")
    with pytest.raises(OSError, match="symbolic"):
        note(tmp_path / "contact", "boot-1", 1.0)


def test_the_latest_contact_counts(tmp_path: Path) -> None:
    path, now = tmp_path / "contact", time.clock_gettime(time.CLOCK_BOOTTIME)
    watch = Watch(path, boot="boot-1", contact=now, seconds=60)
    assert 55 < watch.seconds_left() <= 60
    note(path, "boot-1", now - 30)  # an older one
    assert 55 < watch.seconds_left() <= 60
    note(path, "boot-1", now + 30)
    assert 85 < watch.seconds_left() <= 90
    path.unlink()
    assert 85 < watch.seconds_left() <= 90
    note(path, "boot-2", now + 1000)
    assert 85 < watch.seconds_left() <= 90
