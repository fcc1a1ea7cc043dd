"""Manifests: listings of inputs, pinned once for all partitions of a job's generation.

`desk` answers nodes, `reconciler` removes what belongs to nothing any more.
"""

from bacalhau_controllers.manifest.desk import PinDesk
from bacalhau_controllers.manifest.reconciler import ManifestReconciler

__all__ = ["ManifestReconciler", "PinDesk"]
