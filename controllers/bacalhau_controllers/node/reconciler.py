"""Keeps the status of nodes: writes when something changes, never because a heartbeat came."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.node import Node, NodeStatus
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.node.plan import View, plan
from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why

logger = logging.getLogger(__name__)


class NodeReconciler:
    """Moves the status of nodes, from what `presence` knows of them."""

    name = "node"
    workers = 32  # commits under way together share batches in the store

    def __init__(self, state: State, clock: Clock, presence: Presence) -> None:
        self._state = state
        self._clock = clock
        self._presence = presence
        self.watches: Mapping[str, Watch] = {"Execution": self._of_execution}

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """Follow who is heard from while this process leads."""
        async with self._presence.term(wake):
            yield

    async def reconcile(self, ref: Ref) -> Result:
        """Bring one node's status up to date."""
        node = self._state.cache.get(ref)
        if not isinstance(node, Node):
            self._presence.forget(ref.name)
            return Result()
        view = View(
            sighting=self._presence.sighting(node.name),
            silence=self._presence.silence(node.name),
            executions_open=self._open_executions(node),
        )
        todo = plan(node, view, self._clock.now())
        if todo.status != node.status:
            put = Put(node.but(status=todo.status), node.metadata.resource_version)
            await self._state.commit([put], _why(node.status, todo.status))
            _log(node, todo.status)
        return Result(requeue_after=todo.requeue_after)

    def _open_executions(self, node: Node) -> int:
        """Counted only where it matters: they may be many."""
        if not node.spec.drain:
            return 0
        found = self._state.cache.on_node(node.name, "Execution")
        return sum(1 for e in found if isinstance(e, Execution) and not e.is_final)

    def _of_execution(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        """A node that drains wants to know when executions on it come and go."""
        execution = new or old
        if not isinstance(execution, Execution) or _is_open(old) == _is_open(new):
            return
        ref = Ref("Node", "", execution.spec.node)
        node = self._state.cache.get(ref)
        if isinstance(node, Node) and node.spec.drain:
            yield ref


def _is_open(execution: Resource | None) -> bool:
    return isinstance(execution, Execution) and not execution.is_final


def _why(old: NodeStatus, new: NodeStatus) -> Why:
    if new.contact is not old.contact:
        return Why("node-reconciler", f"Contact{new.contact}")
    if new.incarnation != old.incarnation:
        return Why("node-reconciler", "NewLedger")
    return Why("node-reconciler", "Observed")


def _log(node: Node, new: NodeStatus) -> None:
    if new.contact is not node.status.contact:
        logger.info(
            "Contact of node changed", extra={"node": node.name, "contact": str(new.contact)}
        )
