"""Names for what jobs read, so that a node can say how much of it is there without saying what.

An input's key is a digest of its source: a job that reads the same source asks for the same key,
and a URL with a secret in it is not told to whoever may look at nodes. Where objects are shared out
among the partitions of a job, each share has a key of its own. Keys are hints for placement: what
lies behind a source may have changed since.
"""

import hashlib
import json
from typing import Final

from bacalhau_api.v1.job import InputSource, SpecConfig

_NOT_FETCHED: Final = frozenset({"local", "localdirectory", "inline"})
"""Inputs that lie on a node or travel with the job."""

_UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")


def input_key(source: SpecConfig, partition: int = 0, partitions: int = 1) -> str:
    """16 hex digits for what one partition of a job reads; empty for what no node has to fetch.

    The source is in its canonical form, as stored jobs are.
    """
    kind = source.type.lower()
    if kind in _NOT_FETCHED:
        return ""
    named: list[object] = [kind, source.params]
    if partitions > 1 and _is_shared_out(source):
        named.append([partition, partitions])
    text = json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def input_keys(
    sources: tuple[InputSource, ...], partition: int = 0, partitions: int = 1
) -> tuple[str, ...]:
    """The keys of all that one partition reads and some node has to fetch."""
    keys = (input_key(item.source, partition, partitions) for item in sources)
    return tuple(dict.fromkeys(filter(None, keys)))


def shown_bytes(size: int) -> str:
    """So many bytes for people: `512 B`, `1.2 GiB`."""
    value, unit = float(size), "B"
    for larger in _UNITS:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def _is_shared_out(source: SpecConfig) -> bool:
    partition = source.params.get("partition")
    return isinstance(partition, dict) and partition.get("type", "none") != "none"
