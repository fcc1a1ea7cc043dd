"""Jobs: from what a user asks for to executions on nodes, and from their results back.

`owned` groups what a job owns; `plan` decides, from small modules each about one question: `look` (what does a slot need?), `retry`
(what does this end mean, and when may the next attempt start?), `placing`, `work` and `rollout`
(the four types of job), `cleanup`, `status`. `queue` keeps the order of those who wait, `reconciler`
carries out.
"""

from bacalhau_controllers.job.draft import Plan, Queued
from bacalhau_controllers.job.owned import Owned
from bacalhau_controllers.job.plan import Inputs, plan
from bacalhau_controllers.job.queue import WaitQueue
from bacalhau_controllers.job.reconciler import JobReconciler
from bacalhau_controllers.job.settings import JobSettings
from bacalhau_controllers.job.status import FINALIZER

__all__ = [
    "FINALIZER",
    "Inputs",
    "JobReconciler",
    "JobSettings",
    "Owned",
    "Plan",
    "Queued",
    "WaitQueue",
    "plan",
]
