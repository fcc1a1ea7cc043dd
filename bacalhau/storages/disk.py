"""What the input cache asks of the disk: hard links, and errors in the project's words."""

import contextlib
import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from bacalhau.flush import fsync_path
from bacalhau_api.errors import TransientError


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


def make_parents(directory: Path, made: set[Path]) -> None:
    """Make a directory and what is missing above it; `made` are those that are there, and grows."""
    missing = []
    while directory not in made:
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        path.mkdir(mode=0o755)
        os.chmod(path, 0o755)
        made.add(path)


def link(source: Path, target: Path) -> None:
    """Have a file appear in a second place."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP):
            raise
        # No (more) links here: a copy costs room, but is right.
        shutil.copyfile(source, target, follow_symlinks=False)
        os.chmod(target, 0o444)
        fsync_path(target)
