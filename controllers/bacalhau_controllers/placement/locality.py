"""Where the data is: which nodes hold how much of what an execution reads, as they said themselves.

It is a hint. What a node held may be evicted, and what lies behind a source may have changed; so it
only decides among nodes that fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from bacalhau_api.locality import shown_bytes

_WEIGHT: Final = 2.0
"""More than an empty node has over a full one, and than other executions of the same job cost."""

_HALF_BYTES: Final = 256 * 1024 * 1024
"""What has half of that weight: it takes some seconds to bring, which is worth a fuller node."""

_OTHERS_SHOWN: Final = 2


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """Bytes of an execution's inputs by node that holds any. `total_bytes` are those of all of
    them, None if some input is not known to anybody. Compared by identity."""

    held: Mapping[str, int] = field(default_factory=dict)
    total_bytes: int | None = None


NOWHERE: Final = Near()
"""Nobody holds any of it."""


def locality_score(held_bytes: int) -> float:
    """From 0 towards 2, the more bytes need not be moved."""
    return _WEIGHT * held_bytes / (held_bytes + _HALF_BYTES) if held_bytes > 0 else 0.0


def holding(near: Near, node: str) -> str:
    """`holds 1.2 GiB of 1.5 GiB` of the inputs."""
    held = near.held.get(node, 0)
    if near.total_bytes is None:
        return f"holds {shown_bytes(held)}" if held else "holds nothing"
    if not held:
        return f"holds nothing of {shown_bytes(near.total_bytes)}"
    return f"holds {shown_bytes(held)} of {shown_bytes(near.total_bytes)}"


def data_words(near: Near, node: str) -> str:
    """What the choice of a node means for the inputs: `n2 already holds 1.2 GiB of 1.5 GiB`. Nodes
    that hold more are named. Empty if nobody holds any."""
    if not near.held:
        return ""
    mine = near.held.get(node, 0)
    more = sorted((-size, name) for name, size in near.held.items() if size > mine)
    others = [f"{name} {holding(near, name)}" for _, name in more[:_OTHERS_SHOWN]]
    if len(more) > _OTHERS_SHOWN:
        others.append(f"{len(more) - _OTHERS_SHOWN} other nodes hold more as well")
    own = f"{node} {'already ' if mine else ''}{holding(near, node)}"
    return f"{own}, though {'; '.join(others)}" if others else own
