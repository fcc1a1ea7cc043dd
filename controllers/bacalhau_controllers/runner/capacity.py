"""What the node has and who holds how much of it: a queue in order of arrival."""

import asyncio
from collections import deque
from dataclasses import dataclass

from bacalhau_api.v1.job import Resources


def plus(a: Resources, b: Resources) -> Resources:
    """The sum, part by part."""
    return Resources(
        cpu_millis=a.cpu_millis + b.cpu_millis,
        memory_bytes=a.memory_bytes + b.memory_bytes,
        disk_bytes=a.disk_bytes + b.disk_bytes,
        gpu=a.gpu + b.gpu,
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
        self._waiting: deque[_Waiter] = deque()

    @property
    def allocated(self) -> Resources:
        """What is handed out."""
        total = Resources()
        for resources in self.held.values():
            total = plus(total, resources)
        return total

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def hold(self, uid: str, asked: Resources) -> None:
        """Take without asking: it runs already."""
        self.held[uid] = asked

    async def take(self, uid: str, asked: Resources) -> None:
        """Return once the capacity is held; at once if it is held already. Waits for as long as
        it takes; a caller that is cancelled leaves the queue."""
        if uid in self.held:
            return
        if not self._waiting and self._fits(asked):
            self.held[uid] = asked
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
        if self.held.pop(uid, None) is not None:
            self._serve()

    def _fits(self, asked: Resources) -> bool:
        if len(self.held) >= self.executions_max:
            return False
        return not exceeds(plus(self.allocated, asked), self.capacity)

    def _serve(self) -> None:
        while self._waiting and self._fits(self._waiting[0].asked):
            waiter = self._waiting.popleft()
            if waiter.ready.done():
                continue
            self.held[waiter.uid] = waiter.asked
            waiter.ready.set_result(None)
