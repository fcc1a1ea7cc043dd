"""Telling apart history entries of changes that happened from those that were only begun.

The entry of a lone change is stored right before the change. If a crash or another writer comes in
between, the entry stays alone. It is written over when the change is tried again; until then it is
recognised by having no consequence: the change is not there, and nothing was built on it.
"""

from bacalhau.store.codec import BATCH, OPERATION, object_subject, parse_ref, successor_filter
from bacalhau.store.feed import Delivery
from bacalhau.store.stream import Stored, Stream


async def happened(stream: Stream, entry: Stored | Delivery) -> bool:
    """Whether the change of a history entry took place."""
    headers = entry.headers or {}
    # Batches are whole, and removals go out in batches only.
    if BATCH in headers or OPERATION in headers:
        return True
    ref, revision = parse_ref(entry.subject), entry.sequence + 1
    change = await stream.at(revision)
    if change is not None and change.subject == object_subject(ref):
        return True
    return await stream.last(successor_filter(ref, revision)) is not None


def previous_revision(entry: Delivery) -> int:
    """The revision that the change of an entry was made on."""
    return int(entry.subject.rpartition(".")[2])


async def without_unhappened(stream: Stream, entries: list[Delivery]) -> list[Delivery]:
    """The entries whose change took place, in order. Few need a closer look: those that none of
    the others was built on, which is mostly the newest one."""
    built_on = {previous_revision(entry) for entry in entries}
    return [
        entry
        for entry in entries
        if entry.sequence + 1 in built_on or await happened(stream, entry)
    ]
