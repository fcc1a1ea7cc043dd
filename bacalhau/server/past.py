"""Reads of the past: what an object was at a time or revision, what changed between two, and back
to an old one. Pure over history entries; the store is read by the routes."""

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Final

from bacalhau.replies import HistoryItem
from bacalhau_api.compare import comparable
from bacalhau_api.errors import InvalidError, NotFoundError, Problem
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.provenance import provenance_of
from bacalhau_controllers.store import HistoryEntry

ENTRIES_MAX: Final = 100_000
"""Of one object's history that are looked at."""

_REVISION: Final = re.compile(r"(g?)([0-9]{1,18})")


def items(entries: Sequence[HistoryEntry]) -> list[HistoryItem]:
    """Entries, oldest first, as they are told; each compared with the one before."""
    told: list[HistoryItem] = []
    before: Resource | None = None
    for entry in entries:
        told.append(_item(entry, before))
        before = entry.resource
    return told


def _item(entry: HistoryEntry, before: Resource | None) -> HistoryItem:
    item = entry.resource
    phase = getattr(getattr(item, "status", None), "phase", "")
    is_declared = _is_declared(item, before)
    told = HistoryItem(
        revision=entry.revision,
        time=entry.time,
        uid=entry.uid,
        actor=entry.actor,
        reason=entry.reason,
        message=entry.message,
        phase=str(phase),
        removed=item is None,
        generation=item.metadata.generation if item else 0,
        declared=is_declared,
    )
    if item is None or not is_declared:
        return told
    origin = provenance_of(item)
    return told.but(source=origin.source, commit=origin.commit, by=origin.by)


def _is_declared(item: Resource | None, before: Resource | None) -> bool:
    if item is None:
        return False
    if before is None or before.metadata.uid != item.metadata.uid:
        return True
    is_asked = before.metadata.generation != item.metadata.generation
    return is_asked or comparable(item) != comparable(before)


def at_time(entries: Sequence[HistoryEntry], ref: Ref, moment: datetime) -> HistoryEntry:
    """The state at a moment. Raises NotFoundError where there was none, or none is known."""
    before = [entry for entry in entries if entry.time <= moment]
    text = f"{moment:%Y-%m-%d %H:%M:%S} UTC"
    if not before:
        first = f"; it begins at {entries[0].time:%Y-%m-%d %H:%M:%S} UTC" if entries else ""
        raise NotFoundError(
            f"the history of {ref} does not reach back to {text}{first}",
            hint=f"see what there is: bacalhau history {ref.kind.lower()}/{ref.name}",
        )
    if before[-1].resource is None:
        raise NotFoundError(
            f"{ref} did not exist at {text}: it was removed at "
            f"{before[-1].time:%Y-%m-%d %H:%M:%S} UTC"
        )
    return before[-1]


def at_revision(entries: Sequence[HistoryEntry], ref: Ref, text: str, field: str) -> HistoryEntry:
    """The state at a revision (or just before the next one), or the newest of a generation
    (`g3`). Raises InvalidError, NotFoundError."""
    match = _REVISION.fullmatch(text.strip())
    hint = f"see the revisions: bacalhau history {ref.kind.lower()}/{ref.name}"
    if match is None:
        raise InvalidError([Problem(field, "is not a revision such as 120 or g2", text[:40], hint)])
    number = int(match[2])
    if match[1]:
        found = [e for e in entries if e.resource and e.resource.metadata.generation == number]
        words = f"{ref} has no generation {number} in its history"
    else:
        found = [e for e in entries if e.revision <= number][-1:]
        words = f"the history of {ref} does not reach back to revision {number}"
    if not found:
        raise NotFoundError(words, hint=hint)
    if found[-1].resource is None:
        raise NotFoundError(f"{ref} did not exist at revision {number}", hint=hint)
    return found[-1]
