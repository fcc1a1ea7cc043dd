"""Nodes: whether they take part, whether they are heard from, what they say they can do."""

from bacalhau_controllers.node.presence import Presence
from bacalhau_controllers.node.reconciler import NodeReconciler

__all__ = ["NodeReconciler", "Presence"]
