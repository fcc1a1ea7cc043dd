"""Watched directories: manifests in, objects kept as they say.

`plan` and `prune` decide, `reconciler` acts through the ports of `ports`, `objects` writes objects
together with the claims that say whose they are, `claims` looks after claims nobody needs.
"""

from bacalhau_controllers.gitops.claims import ClaimReconciler
from bacalhau_controllers.gitops.objects import StoreObjects, restore
from bacalhau_controllers.gitops.ports import Declared, Done, Objects, Order, Tree, TreeView
from bacalhau_controllers.gitops.reconciler import SourceReconciler, SourceSettings

__all__ = [
    "ClaimReconciler",
    "Declared",
    "Done",
    "Objects",
    "Order",
    "SourceReconciler",
    "SourceSettings",
    "StoreObjects",
    "Tree",
    "TreeView",
    "restore",
]
