"""Publications: how far outputs are on their way to their target, as their node reports it."""

from bacalhau_controllers.publishing.reconciler import PublishingReconciler

__all__ = ["PublishingReconciler"]
