"""A directory as git has it at HEAD: a commit is atomic, whatever happens to the files meanwhile.

Plumbing commands only, which run no hooks and touch neither the files nor the network. Each has a
deadline.
"""

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

COMMAND_SECONDS: Final = 30.0
OBJECT_BYTES_MAX: Final = 512 * 1024 * 1024

_SETTINGS: Final = (
    "-c", "core.fsmonitor=false",
    "-c", "protocol.allow=never",
    "-c", "core.quotePath=false",
)  # fmt: skip
_ENVIRONMENT: Final = {
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "LC_ALL": "C",
}


class GitError(Exception):
    """Git could not be asked, or answered that something is wrong."""


class NotAClone(GitError):
    """The directory does not belong to a repository."""


@dataclass(frozen=True, slots=True)
class Clone:
    """Where a directory lies in its repository. `prefix` is its path from the top, such as
    `fleet/jobs`; `git_dir` that of the work tree, `common_dir` that of the repository."""

    root: Path
    prefix: str
    git_dir: Path
    common_dir: Path


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a commit. `mode` is such as 100644; 120000 is a link."""

    path: str
    mode: str
    blob: str
    size: int


async def find(root: Path) -> Clone:
    """The repository that a directory belongs to. Raises NotAClone, GitError."""
    if not _is_directory(root):
        raise GitError(f"{root} is not a directory")
    out = await _run(
        root, "rev-parse", "--is-inside-git-dir", "--is-bare-repository", "--show-prefix",
        "--absolute-git-dir", "--git-common-dir",
    )  # fmt: skip
    lines = out.decode("utf-8", "surrogateescape").split("\n")
    inside, bare, prefix, git_dir, common = (*lines, "", "", "", "", "")[:5]
    if inside == "true" and bare != "true":
        raise NotAClone(f"{root} lies in a .git directory")
    common_dir = Path(common) if os.path.isabs(common) else root / common
    return Clone(root, prefix.rstrip("/") if bare != "true" else "", Path(git_dir), common_dir)


async def head(clone: Clone) -> str:
    """The commit at HEAD; empty if there is none yet. Raises GitError."""
    try:
        out = await _run(clone.root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    except GitError:
        # A repository without any commit, or one whose HEAD names a branch that does not exist.
        await _run(clone.root, "rev-parse", "--git-dir")
        return ""
    return out.decode("ascii").strip()


async def files(clone: Clone, commit: str) -> Sequence[Entry] | None:
    """All files below the directory in a commit, by paths relative to it; None if the commit has no
    such directory. Raises GitError."""
    tree = f"{commit}:{clone.prefix}" if clone.prefix else f"{commit}^{{tree}}"
    try:
        kind = await _run(clone.root, "cat-file", "-t", tree)
    except GitError:
        await _run(clone.root, "cat-file", "-t", commit)
        return None
    if kind.strip() != b"tree":
        return None
    out = await _run(clone.root, "ls-tree", "-r", "-z", "-l", "--full-tree", tree)
    return [_entry(line) for line in out.split(b"\0") if line]


async def contents(clone: Clone, blobs: Sequence[str]) -> Mapping[str, bytes]:
    """The content of some blobs, by their ids. Raises GitError."""
    if not blobs:
        return {}
    given = "".join(f"{blob}\n" for blob in blobs).encode()
    out = await _run(clone.root, "cat-file", "--batch", given=given)
    found: dict[str, bytes] = {}
    at = 0
    for blob in blobs:
        end = out.find(b"\n", at)
        words = out[at:end].split()
        if end < 0 or len(words) != 3 or words[1] != b"blob":
            hint = "is the clone complete? a partial one cannot be read without its server"
            raise GitError(f"the object {blob} of {clone.root} is missing; {hint}")
        size = int(words[2])
        found[blob] = out[end + 1 : end + 1 + size]
        at = end + 2 + size
    return found


def _entry(line: bytes) -> Entry:
    about, _, path = line.partition(b"\t")
    mode, _, blob, size = about.split()
    return Entry(
        path.decode("utf-8", "surrogateescape"),
        mode.decode(),
        blob.decode(),
        int(size) if size.isdigit() else 0,
    )


async def _run(root: Path, *words: str, given: bytes = b"") -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            "git", *_SETTINGS, *words,
            cwd=root,
            env={**_inherited(), **_ENVIRONMENT},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except FileNotFoundError as error:
        if not _is_directory(root):
            raise GitError(f"{root} is not a directory") from error
        raise GitError("git is not installed; install it, or set view: files") from error
    except OSError as error:
        raise GitError(f"git cannot be run in {root}: {error.strerror or error}") from error
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            out, told = await process.communicate(given)
    except TimeoutError as error:
        raise GitError(f"git {words[0]} did not answer within {COMMAND_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode == 0:
        return out
    text = told.decode("utf-8", "replace").strip()
    if "not a git repository" in text.lower():
        raise NotAClone(text)
    if "dubious ownership" in text.lower():
        raise GitError(
            f"git refuses {root}, which belongs to another user: give it to this one, or run "
            f"git config --global --add safe.directory {root}"
        )
    raise GitError(f"git {words[0]}: {text.splitlines()[0] if text else 'failed'}"[:500])


def _is_directory(root: Path) -> bool:
    return root.is_dir()


def _inherited() -> dict[str, str]:
    """The environment without what points git at another repository, as in its own hooks."""
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
