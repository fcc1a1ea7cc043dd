"""What the node has and who holds how much of it: a queue in order of arrival."""

import asyncio
from collections import deque
from dataclasses import dataclass

from bacalhau_api.v1.job import Resources

Amounts = tuple[int, int, int, int]
"""Millicores, bytes of memory, bytes of disk, devices: what is counted with on the hot path."""


def amounts_of(resources: Resources) -> Amounts:
    """The same as plain numbers."""
    return (
        resources.cpu_millis,
        resources.memory_bytes,
        resources.disk_bytes,
        resources.gpu,
    )


def exceeds(asked: Resources, limit: Resources) -> tuple[str, ...]:
    """The resources of which more is asked than there is, in words for users."""
    parts = (
        ("CPU (millicores)", asked.cpu_millis, limit.cpu_millis),
        ("memory (bytes)", asked.memory_bytes, limit.memory_bytes),
        ("disk (bytes)", asked.disk_bytes, limit.disk_bytes),
        ("GPUs", asked.gpu, limit.gpu),
    )
    return tuple(f"{name}: {a} asked, {has} there" for name, a, has in parts if a > has)


@dataclass(slots=True)
class _Waiter:
    uid: str
    asked: Resources
    ready: asyncio.Future[None]


class Allocator:
    """Hands out capacity. Never more than there is, except to what ran before a restart with
    less capacity, which is not stopped for that.

    Strictly in order of arrival, so that many small executions cannot starve a large one.
    """

    def __init__(self, capacity: Resources, executions_max: int) -> None:
        self.capacity = capacity
        self.executions_max = executions_max
        self.held: dict[str, Resources] = {}
        self._total: Amounts = (0, 0, 0, 0)
        self._waiting: deque[_Waiter] = deque()

    @property
    def allocated(self) -> Resources:
        """What is handed out."""
        cpu, memory, disk, gpu = self._total
        return Resources(cpu_millis=cpu, memory_bytes=memory, disk_bytes=disk, gpu=gpu)

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def hold(self, uid: str, asked: Resources) -> None:
        """Take without asking: it runs already."""
        self.give_back(uid)
        self._count(asked, 1)
        self.held[uid] = asked

    async def take(self, uid: str, asked: Resources) -> None:
        """Return once the capacity is held; at once if it is held already. Waits for as long as
        it takes; a caller that is cancelled leaves the queue."""
        if uid in self.held:
            return
        if not self._waiting and self._fits(asked):
            self.hold(uid, asked)
            return
        waiter = _Waiter(uid, asked, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            await waiter.ready
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._serve()
            raise

    def give_back(self, uid: str) -> None:
        """Let go; no error if nothing was held."""
        held = self.held.pop(uid, None)
        if held is not None:
            self._count(held, -1)
            self._serve()

    def _fits(self, asked: Resources) -> bool:
        if len(self.held) >= self.executions_max:
            return False
        needed = zip(self._total, amounts_of(asked), amounts_of(self.capacity), strict=True)
        return all(held + more <= limit for held, more, limit in needed)

    def _count(self, resources: Resources, sign: int) -> None:
        cpu, memory, disk, gpu = self._total
        a, b, c, d = amounts_of(resources)
        self._total = (cpu + sign * a, memory + sign * b, disk + sign * c, gpu + sign * d)

    def _serve(self) -> None:
        while self._waiting and self._fits(self._waiting[0].asked):
            waiter = self._waiting.popleft()
            if waiter.ready.done():
                continue
            self.hold(waiter.uid, waiter.asked)
            waiter.ready.set_result(None)
