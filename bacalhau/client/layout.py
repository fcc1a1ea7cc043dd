"""Where downloaded files go. Pure: decided from lists of files, before a byte is fetched.

One slot: its files lie at the top. Several slots:

    DIR/stdout, stderr, exitCode      those of all slots, one after the other in the order of slots
    DIR/partitions/<slot>/…           each slot's own stdout, stderr and exitCode
    DIR/<result>/…                    layout `merged`: the result trees of all slots in one
    DIR/partitions/<slot>/<result>/…  layout `partitions`: each slot's result tree by itself

`auto` merges, unless two slots have a file of one name: then nothing is merged, so that a file is
never replaced by another, and where things lie does not depend on which of them clashed.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from bacalhau_api.errors import InvalidError, Problem, TerminalError

Layout = Literal["auto", "merged", "partitions"]

STREAMS: Final = ("stdout", "stderr", "exitCode")
PARTITIONS: Final = "partitions"
_PATH_BYTES_MAX: Final = 3500
_NAME_BYTES_MAX: Final = 255


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a slot."""

    slot: str
    path: str


@dataclass(frozen=True, slots=True)
class Placement:
    """`files`: target path to the one file that goes there. `joined`: target path to the files
    whose contents go there one after the other. `notes` are for the user."""

    files: Mapping[str, Source]
    joined: Mapping[str, tuple[Source, ...]]
    notes: tuple[str, ...] = ()


def place(slots: Sequence[tuple[str, Sequence[str]]], layout: Layout) -> Placement:
    """Decide for all files of all slots, given in order as (slot, paths).

    Raises TerminalError for a path that would leave the directory, InvalidError if `merged` is
    asked for and impossible.
    """
    for slot, paths in slots:
        check_parts(slot)
        for path in paths:
            check_parts(path)
    if len(slots) == 1:
        slot, paths = slots[0]
        return Placement({path: Source(slot, path) for path in paths}, {})
    clash = _clash(slots)
    if clash and layout == "merged":
        hint = "use --layout partitions, which keeps the slots apart"
        raise InvalidError([Problem("--layout", f"slots cannot be merged: {clash}", hint=hint)])
    notes = (f"slots are kept apart below {PARTITIONS}/: {clash}",) if clash else ()
    is_merged = layout != "partitions" and not clash
    files: dict[str, Source] = {}
    joined: dict[str, tuple[Source, ...]] = {}
    for slot, paths in slots:
        for path in paths:
            source = Source(slot, path)
            if path in STREAMS:
                joined[path] = (*joined.get(path, ()), source)
            is_top = is_merged and path not in STREAMS
            files[path if is_top else f"{PARTITIONS}/{slot}/{path}"] = source
    return Placement(files, joined, notes if layout == "auto" else ())


def _clash(slots: Sequence[tuple[str, Sequence[str]]]) -> str:
    """What stands in the way of merging, in words; empty if nothing does."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for slot, paths in slots:
        for path in paths:
            if path in STREAMS:
                continue
            if _folded(path).split("/")[0] in (PARTITIONS, *map(_folded, STREAMS)):
                return f"slot {slot} has a result of the reserved name {path.split('/')[0]!r}"
            key = _folded(path)
            other = seen.get(key) or folders.get(key)
            parts = key.split("/")
            above = ["/".join(parts[:i]) for i in range(1, len(parts))]
            other = other or next((seen[folder] for folder in above if folder in seen), None)
            if other is not None and other != slot:
                return f"slots {other} and {slot} both have {path!r}"
            seen[key] = slot
            folders.update({folder: slot for folder in above})
    return ""


def _folded(path: str) -> str:
    """Two paths of one folded form are one file on some file systems."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def check_parts(path: str) -> tuple[str, ...]:
    """The components of a relative path that stays where it is put. Raises TerminalError."""
    parts = tuple(path.split("/"))
    is_inside = not any(part in ("", ".", "..") for part in parts) and "\0" not in path
    try:
        is_short = len(path.encode()) <= _PATH_BYTES_MAX and all(
            len(part.encode()) <= _NAME_BYTES_MAX for part in parts
        )
    except UnicodeEncodeError:
        is_short = False
    if not is_inside or not is_short:
        raise TerminalError(
            f"the server lists an output called {path[:200]!r}, which cannot be kept safely",
            reason="UnsafePath",
        )
    return parts
