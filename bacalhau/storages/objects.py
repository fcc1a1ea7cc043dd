"""Which objects of a bucket an input means, and where each of them appears.

    key            means                                  a file appears as
    a/b.csv        that object                            b.csv
    a/  or  a/*    everything below                       its key without a/
    a/b*           everything that begins so              its key without a/
    a/*/x-?.csv    what matches; `*` stays within one     its key without a/
                   part of the path, `**` does not
    (empty)        the whole bucket                       its key

`[*]`, `[?]` and `[[]` stand for the characters themselves. Only a lone `*` at the end spans parts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import re2  # type: ignore[import-untyped]

from bacalhau.storages.disk import check_tree_path
from bacalhau_api.errors import TerminalError

_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One object, as a listing has it."""

    key: str
    size_bytes: int
    etag: str
    version: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """What a key means. `prefix` bounds the listing, `base` is cut from the paths of files,
    `pattern` (if any) is matched with the whole key. `is_single`: exactly one object."""

    prefix: str
    base: str
    pattern: Any = None
    is_single: bool = False

    def covers(self, key: str) -> bool:
        """Whether an object below the prefix is meant."""
        return self.pattern is None or self.pattern.fullmatch(key) is not None

    def path(self, key: str) -> str:
        """Where an object appears. Raises TerminalError for keys that no path can be made of."""
        name = key[len(self.base) :]
        try:
            return check_tree_path(name)
        except ValueError as error:
            raise TerminalError(
                f"the object {key[:200]!r} cannot be a file named {name[:200]!r}: {error}; leave "
                "it out with a filter",
                reason="InputFailed",
            ) from error


def select(key: str) -> Selection:
    """Read a key."""
    if not key or (key.endswith("/") and not _MAGIC.search(key)):
        return Selection(prefix=key, base=key)
    body = key[:-1] if key.endswith("*") and not key.endswith("**") else key
    found = _MAGIC.search(body)
    if found is None and body is not key:
        return Selection(prefix=body, base=body[: body.rfind("/") + 1])
    if found is None:
        return Selection(key, key[: key.rfind("/") + 1], is_single=True)
    literal = key[: found.start()]
    base = literal[: literal.rfind("/") + 1]
    text = glob_expression(body) + (".*" if body is not key or key.endswith("/") else "")
    return Selection(literal, base, expression(f"(?s){text}", "key"))


def glob_expression(pattern: str) -> str:
    """A regular expression for a glob over `/`-separated parts; without backtracking that grows."""
    out: list[str] = []
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if pattern.startswith("**", at):
            out.append(".*")
            at = at + 2
            continue
        if char == "*":
            out.append("[^/]*")
        elif char == "?":
            out.append("[^/]")
        elif char == "[" and "]" in pattern[at + 2 :]:
            end = pattern.index("]", at + 2)
            body = pattern[at + 1 : end]
            negated = body[:1] in ("!", "^")
            chars = re.escape(body[1:] if negated else body).replace(r"\-", "-")
            out.append(f"[{'^/' if negated else ''}{chars}]")
            at = end
        else:
            out.append(re.escape(char))
        at += 1
    return "".join(out)


def expression(text: str, field: str) -> Any:
    """A regular expression of a job, in the RE2 syntax, which takes linear time whatever a
    stranger writes. Raises TerminalError."""
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 8 << 20
    try:
        return re2.compile(text, options)
    except re2.error as error:
        why = error.args[0].decode("utf-8", "replace") if error.args else str(error)
        raise TerminalError(
            f"params.{field} {text[:80]!r} is not a regular expression (RE2 syntax): {why}",
            reason="InvalidInput",
        ) from error


def narrowed(entries: Iterable[Entry], selection: Selection, filter_text: str) -> tuple[Entry, ...]:
    """What of a listing is meant, sorted by key; markers of directories are no files."""
    search = expression(filter_text, "filter").search if filter_text else None
    found = [
        entry
        for entry in entries
        if not entry.key.endswith("/")
        and selection.covers(entry.key)
        and (search is None or search(entry.key[len(selection.prefix) :]) is not None)
    ]
    return tuple(sorted(found, key=lambda entry: entry.key))
