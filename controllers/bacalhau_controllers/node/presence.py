"""Who was heard from, and when: in memory, written by the gateway, read by the reconcilers. And
what was given up because nobody was heard from, written by them, read by the gateway.

A beat costs a few dictionary steps and no write. Only a node that falls silent, comes back, or says
something new about itself wakes its reconciler. Nothing here outlives a term of leadership: a new
leader knows of nobody, and gives every node a fresh grace from its start.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from bacalhau_api.meta import Ref
from bacalhau_api.v1.node import NodeInfo
from bacalhau_controllers.contract import Clock


@dataclass(frozen=True, slots=True)
class Sighting:
    """The latest hello of a node in this term. `is_silent`: not heard from for the beat timeout;
    `is_gone`: the transport saw its connection end."""

    incarnation: str
    session: str
    info: NodeInfo
    is_silent: bool = False
    is_gone: bool = False

    @property
    def is_connected(self) -> bool:
        """True while the node is being heard from."""
        return not (self.is_silent or self.is_gone)


@dataclass(frozen=True, slots=True)
class Silence:
    """For how long nothing was heard from a node, by this process's own monotonic clock.

    `seconds` counts from the last word, or from the start of the term if there was none in it
    (`is_whole` tells which). `grace_left_seconds`: how much longer nodes may take for their first
    hello to this leader; 0 when that is over.
    """

    seconds: float
    is_whole: bool
    grace_left_seconds: float = 0.0


class Presence:
    """Sightings of nodes in the current term of leadership.

    `beat_timeout_seconds` without a word make a node silent. `grace_seconds` is how long nodes
    that did not say hello yet are given after this process began to lead.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        beat_timeout_seconds: float = 15.0,
        grace_seconds: float = 30.0,
    ) -> None:
        self._clock = clock
        self.beat_timeout_seconds = beat_timeout_seconds
        self.grace_seconds = grace_seconds
        self._sightings: dict[str, Sighting] = {}
        # When each node was last heard. `_listening` holds the connected ones, the longest silent
        # first: it tells who is the next to time out without looking at all of them.
        self._heard: dict[str, float] = {}
        self._listening: OrderedDict[str, None] = OrderedDict()
        self._wake: Callable[[Ref], None] | None = None
        self._given_up: set[Ref] = set()
        self._began = clock.monotonic()

    # -- written by the gateway ------------------------------------------------------------------

    def hello(self, node: str, incarnation: str, info: NodeInfo, session: str) -> None:
        """A node introduced itself, or said anew what it is."""
        old = self._sightings.get(node)
        new = Sighting(incarnation, session, info)
        self._sightings[node] = new
        self._listen(node, self._clock.monotonic())
        if new != old:
            self._notify(node)

    def heard(self, node: str, at_monotonic: float) -> bool:
        """A sign of life. False if the node did not say hello in this term: ask it to."""
        old = self._sightings.get(node)
        if old is None:
            return False
        self._listen(node, max(at_monotonic, self._heard.get(node, at_monotonic)))
        if not old.is_connected:
            self._sightings[node] = replace(old, is_silent=False, is_gone=False)
            self._notify(node)
        return True

    def gone(self, node: str, session: str | None = None) -> None:
        """The node's connection ended. With `session`, only if that is still its session: news of
        an old connection's end must not hide the new one."""
        old = self._sightings.get(node)
        if old is None or old.is_gone or session not in (None, old.session):
            return
        self._sightings[node] = replace(old, is_gone=True)
        self._listening.pop(node, None)
        self._notify(node)

    # -- read by reconcilers ---------------------------------------------------------------------

    def sighting(self, node: str) -> Sighting | None:
        """What is known of a node in this term."""
        return self._sightings.get(node)

    def is_connected(self, node: str) -> bool:
        """True while the node is being heard from."""
        sighting = self._sightings.get(node)
        return sighting is not None and sighting.is_connected

    def silence(self, node: str) -> Silence:
        """For how long this process knows the node to be silent."""
        now = self._clock.monotonic()
        return Silence(
            seconds=now - self._heard.get(node, self._began),
            is_whole=node in self._heard,
            grace_left_seconds=max(0.0, self._began + self.grace_seconds - now),
        )

    def forget(self, node: str) -> None:
        """The node's object was deleted. When it was last heard is kept: executions with the
        policy `stop` count from there."""
        self._sightings.pop(node, None)
        self._listening.pop(node, None)

    # -- what was given up -----------------------------------------------------------------------

    def give_up(self, ref: Ref) -> None:
        """An execution is about to be stored as Lost, after which another may take its place. From
        now on, however long that takes and whatever its answer, it is not to begin."""
        self._given_up.add(ref)

    def is_given_up(self, ref: Ref) -> bool:
        """Whether that was said of an execution in this term."""
        return ref in self._given_up

    def settle(self, ref: Ref) -> None:
        """The execution is over or gone."""
        self._given_up.discard(ref)

    # -- terms -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """Start from nothing; call `wake` with each node whose state changed until it ends."""
        for table in (self._sightings, self._heard, self._listening):
            table.clear()
        self._given_up.clear()
        self._began = self._clock.monotonic()
        self._wake = wake
        async with asyncio.TaskGroup() as tasks:
            watcher = tasks.create_task(self._watch(), name="presence watcher")
            try:
                yield
            finally:
                self._wake = None
                watcher.cancel()

    async def _watch(self) -> None:
        """Find those who fall silent. Nobody can become due sooner than the first in line, and
        newcomers not before a whole timeout, so one sleep at a time is enough."""
        while True:
            pause = self.beat_timeout_seconds
            while self._listening:
                node = next(iter(self._listening))
                left = self._heard[node] + self.beat_timeout_seconds - self._clock.monotonic()
                if left > 0:
                    pause = left
                    break
                del self._listening[node]
                self._sightings[node] = replace(self._sightings[node], is_silent=True)
                self._notify(node)
            await self._clock.sleep(pause)

    def _listen(self, node: str, at_monotonic: float) -> None:
        self._heard[node] = at_monotonic
        self._listening[node] = None
        self._listening.move_to_end(node)

    def _notify(self, node: str) -> None:
        if self._wake is not None:
            self._wake(Ref("Node", "", node))
