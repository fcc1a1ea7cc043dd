"""Typed reads for reconcilers, and certainty where it matters.

The cache may lag. A decision that a later write guards may be taken on it; the conclusion that an
object does *not* exist has no such guard, so it is asked of the store itself.
"""

from typing import TypeVar

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Changed

R = TypeVar("R", bound=Resource)


def node_named(state: State, name: str) -> Node | None:
    """The node in the cache."""
    node = state.cache.get(Ref("Node", "", name))
    return node if isinstance(node, Node) else None


def job_of(state: State, namespace: str, name: str, uid: str) -> Job | None:
    """The job in the cache; None if it is gone, or another one has its name now."""
    job = state.cache.get(Ref("Job", namespace, name))
    return job if isinstance(job, Job) and job.metadata.uid == uid else None


async def ask_store(state: State, ref: Ref, kind: type[R]) -> R | None:
    """The object as the store has it now; the cache learns of it. Raises UnavailableError."""
    found = await state.store.get(ref)
    if not isinstance(found, kind):
        return None
    state.cache.learn(Changed(found))
    return found


async def surely_job_of(state: State, namespace: str, name: str, uid: str) -> Job | None:
    """As `job_of`, but absent only if it is absent from the store."""
    job = job_of(state, namespace, name, uid)
    if job is None:
        job = await ask_store(state, Ref("Job", namespace, name), Job)
    return job if job is not None and job.metadata.uid == uid else None


async def surely_node_named(state: State, name: str) -> Node | None:
    """As `node_named`, but absent only if it is absent from the store."""
    return node_named(state, name) or await ask_store(state, Ref("Node", "", name), Node)
