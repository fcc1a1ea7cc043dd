"""Having the disk keep what was written. Standard library only: wasm workers use it too."""

import contextlib
import ctypes
import os
from pathlib import Path

SINGLY_MAX = 64
"""More files than these are flushed with their whole file system: that is cheaper, although it waits
for what others wrote, too."""


def flush_tree(root: Path) -> None:
    """Flush the files and directories below a directory, and itself. Raises OSError if the disk does
    not take them."""
    try:
        found = _few(root)
    except OSError:  # too deep, or a workload with a user of its own has closed it
        found = None
    if found is None:
        sync_file_system(root)
        return
    for path in reversed(found):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile: nothing is lost
            fsync_path(path)


def _few(root: Path) -> list[Path] | None:
    """All files and directories, each directory before what is in it; None if they are many."""
    found, directories = [root], [root]
    while directories:
        with os.scandir(directories.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                is_directory = entry.is_dir(follow_symlinks=False)
                if is_directory:
                    directories.append(path)
                if is_directory or entry.is_file(follow_symlinks=False):
                    found.append(path)
                if len(found) > SINGLY_MAX:
                    return None
    return found


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
