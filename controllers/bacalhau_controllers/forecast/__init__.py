"""Plans: what would follow from a change, from the reconcilers themselves, and applying what was
planned.

`changes` decides what a set of documents means, `world` runs the job reconciler on a copy of all
objects, `describe` says what came of it, `token` binds a plan, `foresee` puts these together, and
`apply.Applier` plans and applies sets against the store.
"""

from bacalhau_controllers.forecast.apply import Applier, PlanOutdatedError, inventory_of
from bacalhau_controllers.forecast.changes import Change, ChangeSet, Owned, Wanted
from bacalhau_controllers.forecast.foresee import Snapshot, foresee, without_nodes
from bacalhau_controllers.forecast.world import Limits, World

__all__ = [
    "Applier",
    "Change",
    "ChangeSet",
    "Limits",
    "Owned",
    "PlanOutdatedError",
    "Snapshot",
    "Wanted",
    "World",
    "foresee",
    "inventory_of",
    "without_nodes",
]
