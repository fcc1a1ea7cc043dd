"""What an operator can do about a file or directory that the system refuses."""

import errno
import os
from pathlib import Path


def remedy(path: Path, error: OSError) -> str:
    """A sentence for the hint of an error that speaks of `path`."""
    match error.errno:
        case errno.EROFS:
            return "its disk is mounted read-only: mount it for writing, then start again"
        case errno.EACCES | errno.EPERM:
            try:
                owner = next(p for p in (path, path.parent) if p.exists()).stat().st_uid
            except (OSError, StopIteration):
                return "start bacalhau as the user who owns the data directory"
            return (
                f"it belongs to user {owner}, and this is user {os.geteuid()}: start bacalhau as "
                "its owner, or give the data directory to this user (chown -R)"
            )
        case errno.EISDIR | errno.ENOTDIR | errno.EEXIST:
            return "something else is in its place: move that away, then start again"
        case errno.ENOSPC | errno.EDQUOT:
            return "make room on its disk, then start again"
    return "see that its disk is sound and writable, then start again"
