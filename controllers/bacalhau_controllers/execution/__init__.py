"""Executions: what nodes reported, what is inferred about those that do not, what they wait for."""

from bacalhau_controllers.execution.reconciler import ExecutionReconciler
from bacalhau_controllers.inbox import FactInbox

__all__ = ["ExecutionReconciler", "FactInbox"]
