"""Retention: finished jobs leave the live set after a while; the history keeps them."""

from bacalhau_controllers.retention.plan import RetentionSettings
from bacalhau_controllers.retention.reconciler import RetentionReconciler, namespace_key

__all__ = ["RetentionReconciler", "RetentionSettings", "namespace_key"]
