"""Having the disk keep what was written. Standard library only: wasm workers use it too."""

import ctypes
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SINGLY_MAX = 64
"""More files than these are flushed with their whole file system: that is cheaper, although it waits
for what others wrote, too."""


def flush_tree(root: Path) -> None:
    """Flush the files and directories below a directory, and itself. Nobody writes there any more."""
    try:
        found = list(islice(_tree(root), SINGLY_MAX + 1))
        if len(found) <= SINGLY_MAX:
            for path in found:
                fsync_path(path)
            return
    except PermissionError:  # a workload with a user of its own has closed it
        pass
    sync_file_system(root)


def _tree(root: Path) -> Iterator[Path]:
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _tree(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
    yield root


def fsync_path(path: Path) -> None:
    """Flush a file or directory."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_file_system(path: Path) -> None:
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
