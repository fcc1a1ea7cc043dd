"""Runs one source: the reconciler under a lease of its own, so that one process at a time looks
after a source, wherever it runs, whoever leads the orchestrators."""

import random
from typing import Final

from bacalhau_controllers.contract import Clock
from bacalhau_controllers.controller import ControllerSettings
from bacalhau_controllers.gitops import Objects, SourceReconciler, SourceSettings, Tree
from bacalhau_controllers.manager import Manager, ManagerSettings
from bacalhau_controllers.state import State
from bacalhau_controllers.workqueue import Backoff

SWEEP_SECONDS: Final = 60.0
DEADLINE_SECONDS: Final = 120.0
LEASE_SECONDS: Final = 12.0


def lease_name(source: str) -> str:
    """The lease under which a source is run."""
    return f"source-{source}"


def source_manager(
    state: State,
    clock: Clock,
    tree: Tree,
    objects: Objects,
    name: str,
    *,
    holder: str,
    runner: str,
    sweep_seconds: float = SWEEP_SECONDS,
    lease_seconds: float = LEASE_SECONDS,
    settings: SourceSettings | None = None,
) -> Manager:
    """What keeps one source going: `run` it. `state` must not be shared: its fence is that of the
    source's lease. `holder` names this process in the lease, `runner` for people."""
    limits = ControllerSettings(
        workers=1,
        sweep_seconds=sweep_seconds,
        deadline_seconds=DEADLINE_SECONDS,
        backoff=Backoff(0.2, 30.0),
    )
    manager = Manager(
        state,
        clock,
        random.Random(),
        holder=holder,
        settings=ManagerSettings(
            lease_name=lease_name(name), lease_ttl_seconds=lease_seconds, controllers=limits
        ),
    )
    reconciler = SourceReconciler(state, clock, tree, objects, name, runner, settings)
    manager.add(reconciler, "Source")
    return manager
