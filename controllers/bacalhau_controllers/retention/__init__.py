"""Retention: finished jobs leave the live set after a while; the history keeps them, for as long as
their namespace says."""

from bacalhau_controllers.retention.history import HistoryReconciler, history_seconds
from bacalhau_controllers.retention.plan import RetentionSettings
from bacalhau_controllers.retention.reconciler import RetentionReconciler, namespace_key

__all__ = [
    "HistoryReconciler",
    "RetentionReconciler",
    "RetentionSettings",
    "history_seconds",
    "namespace_key",
]
