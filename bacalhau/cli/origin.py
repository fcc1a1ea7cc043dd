"""Where a manifest comes from: its path in its git clone, the commit, and who is at the keyboard.

Told to the server with a change, for the history. Whatever cannot be found out is left empty: an
apply never fails for want of it.
"""

import getpass
import os
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bacalhau_api.provenance import Provenance

GIT_SECONDS: Final = 5.0


def origin_of(source: str, message: str = "") -> "Provenance":
    """The origin of what one file declares. `source` is its path; `<stdin>` stays as it is."""
    from bacalhau_api.provenance import LENGTH_MAX, Provenance

    commit = ""
    if source and not source.startswith("<"):
        path = Path(source).absolute()
        root, commit = _clone(path.parent)
        if root:
            source = os.path.relpath(path, root)
            commit = _commit(commit, root, source)
    return Provenance(source=source[-LENGTH_MAX:], commit=commit, by=whoami(), message=message)


@cache
def whoami() -> str:
    """Such as alice@laptop."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a uid without a name
        user = str(os.getuid()) if hasattr(os, "getuid") else "somebody"
    return f"{user}@{socket.gethostname()}"


@cache
def _clone(directory: Path) -> tuple[str, str]:
    """The root of the clone that a directory lies in, and its commit; empty where there is none."""
    words = _git(directory, "rev-parse", "--show-toplevel", "HEAD").split("\n")
    return (words[0], words[1]) if len(words) == 2 and words[0] else ("", "")


def _commit(commit: str, root: str, path: str) -> str:
    """The commit, with a mark where the file is not as committed."""
    changed = _git(Path(root), "status", "--porcelain", "--", path)
    return f"{commit}-dirty" if changed else commit


def _git(directory: Path, *words: str) -> str:
    # Optional locks would write into a clone that others may be using.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words],
            capture_output=True,
            timeout=GIT_SECONDS,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()
