"""A directory as it lies there, at one moment.

There is no such moment while an editor saves or a checkout runs. So files are read only once
nothing has changed for a while, and what was read counts only if nothing changed meanwhile.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bacalhau.gitops.ignore import IGNORE_FILE, Selection
from bacalhau.gitops.parse import FILE_BYTES_MAX, wrong
from bacalhau_api.v1.source import SourceProblem

FILES_MAX: Final = 50_000
ENTRIES_MAX: Final = 500_000
BYTES_MAX: Final = 512 * 1024 * 1024
"""Of all files together."""

_AT_WORK: Final = {
    "index.lock": "git is writing",
    "rebase-merge": "a git rebase is under way",
    "rebase-apply": "a git rebase is under way",
}

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size, and times of change of content and of inode: a file with the same stamp has
the same content."""


class AbsentError(Exception):
    """The directory as a whole cannot be read."""


@dataclass(slots=True)
class Scan:
    """What lies in a directory: the stamp of each file that counts, by its relative path. Two equal
    scans mean that nothing has changed between them."""

    stamps: dict[str, Stamp] = field(default_factory=dict)
    problems: list[SourceProblem] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)
    busy: str = ""
    """What git is in the middle of, in words; empty if it is at rest."""


def scan(root: Path, selection: Selection) -> Scan:
    """Look at a directory and all below it. Raises AbsentError."""
    found = Scan(busy=_git_at_work(root))
    try:
        top = root.stat()
        parent = (root.resolve().parent).stat()
    except OSError as error:
        raise AbsentError(f"{root} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISDIR(top.st_mode):
        raise AbsentError(f"{root} is not a directory")
    if top.st_dev != parent.st_dev:
        found.mounts.append(".")
    real = os.path.realpath(root)
    entries = 0
    todo = [("", top.st_dev)]
    while todo:
        where, device = todo.pop()
        try:
            listed = sorted(os.scandir(root / where if where else root), key=lambda e: e.name)
        except OSError as error:
            if not where:
                raise AbsentError(f"{root} cannot be read: {error.strerror or error}") from error
            found.problems.append(_unreadable(where, error))
            continue
        for entry in listed:
            entries += 1
            if entries > ENTRIES_MAX or len(found.stamps) > FILES_MAX:
                raise AbsentError(
                    f"{root} has more than {FILES_MAX} manifests or {ENTRIES_MAX} entries"
                )
            path = f"{where}/{entry.name}" if where else entry.name
            try:
                _look(entry, path, real, device, selection, found, todo)
            except OSError as error:
                if selection.takes(path):
                    found.problems.append(_unreadable(path, error))
    return found


def _look(
    entry: os.DirEntry[str],
    path: str,
    real: str,
    device: int,
    selection: Selection,
    found: Scan,
    todo: list[tuple[str, int]],
) -> None:
    if entry.is_dir(follow_symlinks=False):
        if selection.enters(path):
            own = entry.stat(follow_symlinks=False).st_dev
            if own != device:
                found.mounts.append(path)
            todo.append((path, own))
        return
    is_link = entry.is_symlink()
    if not selection.takes(path):
        if is_link and not path.startswith(".") and selection.enters(path):
            _check_link(entry, path, real, found)
        return
    if is_link and not _is_inside(entry, real):
        hint = f"put the file itself there, or name the link in {IGNORE_FILE}"
        found.problems.append(
            wrong(path, "Link", "is a link that leads out of the directory", hint)
        )
        return
    about = entry.stat()
    if not stat.S_ISREG(about.st_mode):
        found.problems.append(wrong(path, "NotAFile", "is not a regular file"))
        return
    found.stamps[path] = (
        about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns,
    )  # fmt: skip


def _check_link(entry: os.DirEntry[str], path: str, real: str, found: Scan) -> None:
    """A link to a directory elsewhere is not followed, which is told; one to a directory inside
    need not be, for that is looked at anyway."""
    if entry.is_dir() and not _is_inside(entry, real):
        hint = f"put the directory itself there, or name the link in {IGNORE_FILE}"
        found.problems.append(
            wrong(path, "Link", "is a link that leads out of the directory", hint)
        )


def _is_inside(entry: os.DirEntry[str], real: str) -> bool:
    target = os.path.realpath(entry.path)
    return target == real or target.startswith(real.rstrip("/") + "/")


def read_files(root: Path, found: Scan, known: dict[str, Stamp]) -> dict[str, bytes]:
    """The content of all files but those whose stamp is `known`. What cannot be read is added to
    the problems of the scan."""
    total = sum(stamp[2] for stamp in found.stamps.values())
    if total > BYTES_MAX:
        raise AbsentError(f"the manifests in {root} have more than {BYTES_MAX} bytes together")
    contents = {}
    for path, stamp in found.stamps.items():
        if known.get(path) == stamp:
            continue
        try:
            with (root / path).open("rb") as file:
                contents[path] = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            found.problems.append(_unreadable(path, error))
    return contents


def _git_at_work(root: Path) -> str:
    """What git is doing to the files right now, in words. A rebase shows states in between that
    nobody meant, and stays at one for as long as its user needs to resolve a conflict."""
    for where in (root, *root.parents):
        if (where / ".git").is_dir():
            found = (word for name, word in _AT_WORK.items() if (where / ".git" / name).exists())
            return next(found, "")
    return ""


def _unreadable(path: str, error: OSError) -> SourceProblem:
    return wrong(path, "Unreadable", f"cannot be read: {error.strerror or error}")
