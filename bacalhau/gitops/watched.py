"""The directories that an orchestrator watches itself (`serve --gitops`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bacalhau.gitops.operate import SourceActions
from bacalhau.gitops.runner import source_manager
from bacalhau.gitops.tree import DirectoryTree
from bacalhau_controllers.cache import Cache
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.gitops import StoreObjects
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Store


async def run_sources(
    places: Sequence[tuple[str, Path]],
    store: Store,
    cache: Cache,
    clock: Clock,
    ids: Ids,
    *,
    holder: str,
) -> Mapping[str, Manager]:
    """Make the Source objects that are not there yet, and what keeps each going: run them.

    Each has a state of its own, under the lease of its source: an orchestrator watches its
    directories whether or not it leads.
    """
    actions = SourceActions(State(store, cache), clock, ids)
    managers = {}
    for name, root in places:
        await actions.ensure(name, "user:serve")
        state = State(store, cache)
        managers[name] = source_manager(
            state,
            clock,
            DirectoryTree(root, clock),
            StoreObjects(state, clock, ids),
            name,
            holder=f"{holder}:{name}",
            runner="orchestrator",
        )
    return managers
