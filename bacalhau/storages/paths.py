"""Which local paths jobs may use: a list of patterns, and a way to open what it allows that no
symbolic link and no `..` can lead elsewhere.

A pattern is a glob over whole path components: `*` and `?` stay within one, `**` spans any number.
What lies below an allowed directory is allowed too, because mounting the directory would show it.
"""

import glob
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bacalhau.settings import AllowedPath
from bacalhau_api.errors import TerminalError

_MAGIC = re.compile(r"[*?\[]")


class PathRefusedError(TerminalError):
    """This node does not let jobs use the path; the message says why."""

    reason = "PathNotAllowed"


@dataclass(frozen=True, slots=True)
class _Pattern:
    expression: re.Pattern[str]
    writable: bool
    text: str

    def covers(self, path: PurePosixPath) -> bool:
        """True if the path or a directory above it matches."""
        return any(self.expression.fullmatch(str(p)) for p in (path, *path.parents))


@dataclass(frozen=True, slots=True)
class Vetted:
    """A path that may be used. `missing` are the last components if they do not exist yet."""

    path: Path
    missing: tuple[str, ...] = ()


class PathRules:
    """Decides by the path as it really is on this node, at the moment of asking.

    `private` are directories of the node's own, of which nothing may be shown, whatever the
    patterns say: neither they, nor what they hold, nor what holds them.
    """

    def __init__(self, allowed: Sequence[AllowedPath], private: Sequence[Path] = ()) -> None:
        self._patterns = [_compiled(item) for item in allowed]
        self._private = [Path(os.path.realpath(path)) for path in private]

    @property
    def is_empty(self) -> bool:
        """True if nothing is allowed at all."""
        return not self._patterns

    def vet(self, text: str, *, writable: bool, may_be_missing: bool = False) -> Vetted:
        """Resolve and judge a path. Raises PathRefusedError."""
        if not text.startswith("/") or "\0" in text:
            raise PathRefusedError(f"sourcePath {text!r} must be an absolute path")
        if ".." in text.split("/"):
            raise PathRefusedError(f"sourcePath {text!r} must not contain '..'")
        real, missing = _resolve(text, may_be_missing=may_be_missing)
        whole = PurePosixPath(real, *missing)
        for private in self._private:
            if whole.is_relative_to(private) or private.is_relative_to(whole):
                raise PathRefusedError(f"{text} holds this node's own data")
        covering = [p for p in self._patterns if p.covers(whole)]
        if not covering:
            # Whether it leads elsewhere is not told: that would map the node's disk to strangers.
            known = ", ".join(p.text for p in self._patterns) or "none"
            raise PathRefusedError(
                f"{text} is not among the local paths that this node allows ({known})"
            )
        if writable and not any(p.writable for p in covering):
            raise PathRefusedError(
                f"{text} may only be read on this node; leave readWrite out, or have the "
                "operator allow it with ':rw'"
            )
        return Vetted(real, missing)


def open_beneath(path: Path) -> int:
    """Open an absolute path without following any symbolic link; the caller closes (O_PATH).

    Raises PathRefusedError if a component is a link, OSError if it does not exist."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in path.parts[1:]:
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = below
            if stat.S_ISLNK(os.fstat(fd).st_mode):
                raise PathRefusedError(f"{path} changed while it was looked at")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _resolve(text: str, *, may_be_missing: bool) -> tuple[Path, tuple[str, ...]]:
    """The real path, and the components at the end that do not exist."""
    path = Path(text)
    missing: list[str] = []
    while True:
        try:
            return Path(os.path.realpath(path, strict=True)), tuple(missing)
        except FileNotFoundError as error:
            # A link to nowhere exists: creating "behind" it would create where it points.
            if not may_be_missing or path.is_symlink() or path == path.parent:
                raise PathRefusedError(f"{text} does not exist on this node") from error
            missing.insert(0, path.name)
            path = path.parent
        except OSError as error:
            raise PathRefusedError(f"{text} cannot be used: {error.strerror}") from error


def _compiled(item: AllowedPath) -> _Pattern:
    """The pattern with its fixed beginning resolved, so that it compares with real paths."""
    if not item.pattern.startswith("/"):
        raise TerminalError(
            f"allowed path {item.pattern!r} must be absolute", reason="InvalidSettings"
        )
    parts = [p for p in item.pattern.split("/") if p]
    fixed = 0
    while fixed < len(parts) and not _MAGIC.search(parts[fixed]):
        fixed += 1
    root = os.path.realpath("/" + "/".join(parts[:fixed]))
    rest = "/".join([glob.escape(root).rstrip("/"), *parts[fixed:]])
    return _Pattern(re.compile(_expression(rest)), item.writable, str(item))


def _expression(pattern: str) -> str:
    out: list[str] = []
    at = 0
    while at < len(pattern):
        if pattern.startswith("/**", at) and pattern[at + 3 : at + 4] in ("", "/"):
            out.append("(?:/[^/]+)*")
            at += 3
        elif pattern[at] == "*":
            out.append("[^/]*")
            at += 1
        elif pattern[at] == "?":
            out.append("[^/]")
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inner = pattern[at + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            inner = "^" + inner[1:] if inner.startswith("!") else inner
            out.append(f"(?!/)[{inner}]")
            at = end + 1
        else:
            out.append(re.escape(pattern[at]))
            at += 1
    return "".join(out) or "/"
