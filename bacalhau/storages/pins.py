"""What the inputs of a job were when it first looked, kept for all its partitions and attempts.

The first execution that prepares an input lists it and proposes the listing, shared out among the
partitions; the orchestrator keeps the first proposal and gives that to everybody. So each object
is in exactly one partition, whatever changes in the bucket meanwhile. See docs/architecture.md.
"""

import hashlib
import json
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bacalhau.storages.objects import Entry
from bacalhau_controllers.runner.ports import Use

EVERYBODY = -1
"""Stands for the partition of what all partitions get."""

PART_BYTES_MAX = 256 * 1024
"""Of one part, packed. A message on the line holds 1 MiB, as base64 a third less."""

_PART_LINES = 20_000


@dataclass(frozen=True, slots=True)
class PinnedPart:
    """Consecutive lines of a listing, packed, for the partitions from `first` to `last`."""

    first: int
    last: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Pinned:
    """A listing shared out among partitions: pairs of partition and entry, sorted."""

    partitions: int
    lines: tuple[tuple[int, Entry], ...]

    @classmethod
    def of(
        cls, entries: Sequence[Entry], shares: Sequence[int | None], partitions: int
    ) -> "Pinned":
        """From a listing and the partition of each entry (None: all of them)."""
        pairs = zip(shares, entries, strict=True)
        lines = ((EVERYBODY if share is None else share, entry) for share, entry in pairs)
        return cls(partitions, tuple(sorted(lines, key=lambda line: (line[0], line[1].key))))

    @property
    def digest(self) -> str:
        """`sha256:` over the lines as they are packed."""
        total = hashlib.sha256()
        for line in self.lines:
            total.update(_packed_line(line))
        return f"sha256:{total.hexdigest()}"

    def sizes(self) -> list[tuple[int, int]]:
        """Objects and bytes of each partition, those that all get included."""
        counts = [[0, 0] for _ in range(self.partitions)]
        shared = [0, 0]
        for partition, entry in self.lines:
            count = shared if partition == EVERYBODY else counts[partition]
            count[0] += 1
            count[1] += entry.size_bytes
        return [(n + shared[0], size + shared[1]) for n, size in counts]

    def parts(self) -> list[PinnedPart]:
        """All lines, packed."""
        found: list[PinnedPart] = []
        lines, count = self.lines, _PART_LINES
        at = 0
        while at < len(lines):
            some = lines[at : at + count]
            data = zlib.compress(b"".join(map(_packed_line, some)), 6)
            if len(data) > PART_BYTES_MAX and len(some) > 1:
                count = max(len(some) // 2, 1)
                continue
            found.append(PinnedPart(some[0][0], some[-1][0], data))
            at += len(some)
        return found


def read_part(data: bytes) -> list[tuple[int, Entry]]:
    """The lines of one part. Raises ValueError."""
    try:
        text = zlib.decompress(data)
        rows = [json.loads(line) for line in text.splitlines()]
        return [(int(p), Entry(str(k), int(s), str(e), str(v))) for p, k, s, e, v in rows]
    except (zlib.error, TypeError) as error:
        raise ValueError("the part of a pinned listing is damaged") from error


def mine(lines: Iterable[tuple[int, Entry]], partition: int) -> list[Entry]:
    """What one partition gets."""
    return [entry for share, entry in lines if share in (partition, EVERYBODY)]


Propose = Callable[[], Awaitable[Pinned]]


class Pins(Protocol):
    """Where listings are pinned."""

    async def share(self, use: Use, propose: Propose) -> Sequence[Entry]:
        """The entries of this use's partition, from the listing that its job was pinned to.

        If there is none yet, `propose` makes one; which one counts is not for the caller to say.
        Raises TransientError while the orchestrator cannot be asked.
        """
        ...


class MemoryPins:
    """Pins of one process, for trials and tests."""

    def __init__(self) -> None:
        self.pinned: dict[tuple[str, int, int], Pinned] = {}

    async def share(self, use: Use, propose: Propose) -> Sequence[Entry]:
        """See Pins."""
        key = (use.job_uid, use.generation, use.index)
        if key not in self.pinned:
            proposed = await propose()
            self.pinned.setdefault(key, proposed)
        return mine(self.pinned[key].lines, use.partition)


def _packed_line(line: tuple[int, Entry]) -> bytes:
    partition, entry = line
    row = [partition, entry.key, entry.size_bytes, entry.etag, entry.version]
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
