"""Resources are counted: what an execution takes, what a node has, and whether it fits.

A node's capacity of 0 for CPU, memory or disk means that it declared none, and is not limited
there; 0 GPUs are none. Amounts are integers in the units of `Resources`, and `executions` counts
the executions themselves.
"""

from typing import Final, NamedTuple

from bacalhau_api import quantity
from bacalhau_api.admission import DEFAULT_RESOURCES
from bacalhau_api.v1.job import Resources
from bacalhau_api.v1.node import Node
from bacalhau_controllers.placement.rules import Finding

UNLIMITED: Final = 1 << 60
"""Stands for a capacity that a node did not declare."""

DEFAULTS: Final = DEFAULT_RESOURCES
"""What is set aside for an execution that asks for nothing (one that was not admitted)."""


class Amounts(NamedTuple):
    """One number for each dimension, in the order of DIMENSIONS."""

    cpu: int
    memory: int
    disk: int
    gpu: int
    executions: int


DIMENSIONS: Final = ("Cpu", "Memory", "Disk", "Gpu", "Executions")
"""The rule names of the dimensions."""


def amounts_of(asked: Resources, defaults: Resources = DEFAULTS) -> Amounts:
    """What one execution takes."""
    # An absurd amount is cut to just more than any node has, so that sums stay in 64 bits.
    return Amounts(
        min(asked.cpu_millis or defaults.cpu_millis, UNLIMITED + 1),
        min(asked.memory_bytes or defaults.memory_bytes, UNLIMITED + 1),
        min(asked.disk_bytes or defaults.disk_bytes, UNLIMITED + 1),
        min(asked.gpu or defaults.gpu, UNLIMITED + 1),
        1,
    )


def capacity_of(node: Node) -> Amounts:
    """What a node has in all."""
    info = node.status.info
    return Amounts(
        min(info.capacity.cpu_millis or UNLIMITED, UNLIMITED),
        min(info.capacity.memory_bytes or UNLIMITED, UNLIMITED),
        min(info.capacity.disk_bytes or UNLIMITED, UNLIMITED),
        min(info.capacity.gpu, UNLIMITED),
        min(info.executions_max, UNLIMITED),
    )


def fits(asked: Amounts, free: Amounts) -> bool:
    """Whether there is room in every dimension. Who asks for nothing of one needs no room there,
    even where more is taken than there is (a node that shrank)."""
    return all(need <= have for need, have in zip(asked, free, strict=True) if need)


def fitting(dimension: int, asked: Amounts, free: Amounts, capacity: Amounts) -> Finding:
    """One dimension, in words."""
    name = DIMENSIONS[dimension]
    need, have, total = asked[dimension], free[dimension], capacity[dimension]
    if not need or need <= have:
        left = (
            "enough" if total >= UNLIMITED else f"{text_of(name, have)} of {text_of(name, total)}"
        )
        return Finding(True, f"has {left} {_WORD[name]} free")
    wanted, of = text_of(name, need), text_of(name, total)
    message = f"has {text_of(name, max(have, 0))} of {of} {_WORD[name]} free, {wanted} asked for"
    if need > total:
        remedy = f"ask for at most {of} {_WORD[name]}, or give {{node}} more"
    else:
        missing = text_of(name, need - max(have, 0))
        remedy = f"free {missing} {_WORD[name]} on {{node}}, or ask for that much less"
    if name == "Executions":
        remedy = "end an execution on {node}, or raise its executions_max"
    return Finding(False, message, remedy)


_WORD: Final = {
    "Cpu": "CPU",
    "Memory": "memory",
    "Disk": "disk",
    "Gpu": "GPU",
    "Executions": "executions",
}


def text_of(name: str, amount: int) -> str:
    """An amount of one dimension, for people."""
    if name == "Cpu":
        return quantity.format_cpu(amount)
    if name not in ("Memory", "Disk"):
        return str(amount)
    for unit, size in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if amount >= size:
            return f"{amount / size:.1f}".removesuffix(".0") + unit
    return f"{amount}B"
