"""What happens to a job's executions while their node is not heard from: the effective policy.

The one place where defaults are chosen, so that the reconcilers, `plan` and `describe` agree.
Acting on it is left to the execution reconciler (contact) and the job reconciler (replacements).
"""

from dataclasses import dataclass
from typing import Final, Literal

from bacalhau_api.v1.job import JobSpec, JobType

SERVICE_AFTER_SECONDS: Final = 5 * 60
OTHER_AFTER_SECONDS: Final = 30 * 60
_LOCAL_SOURCES: Final = frozenset({"local", "localdirectory"})

_WINNERS: Final = {
    "firstAccepted": "the first result wins",
    "keepOriginal": "the original wins if it comes back",
    "keepReplacement": "the replacement wins, unless it fails",
}

Action = Literal["hold", "replace", "stop"]
Winner = Literal["firstAccepted", "keepOriginal", "keepReplacement"]


@dataclass(frozen=True, slots=True)
class EffectiveDisconnect:
    """A policy with nothing left open.

    `after_seconds` is None exactly for `hold`, which has no limit. `why` says in one sentence,
    for users, where the choice comes from.
    """

    action: Action
    after_seconds: int | None
    reconcile: Winner
    why: str


def effective_disconnect(spec: JobSpec) -> EffectiveDisconnect:
    """The policy that applies to a job: its own words first, then the default of its type."""
    action, why = _action(spec)
    after = None
    if action != "hold":
        after = spec.disconnect.after_seconds or _default_after(spec)
    return EffectiveDisconnect(action, after, spec.disconnect.reconcile or "firstAccepted", why)


def describe_disconnect(spec: JobSpec) -> str:
    """The policy that applies to a job and why, in one sentence for users."""
    policy = effective_disconnect(spec)
    if policy.after_seconds is None:
        text = "hold: the work is kept for its node, and what it finished counts"
    elif policy.action == "stop":
        text = (
            f"stop after {_duration(policy.after_seconds)}: the node ends the work by its own clock, "
            "and only then is it begun anew, so that two never run at once"
        )
    else:
        wins = _WINNERS[policy.reconcile]
        if policy.reconcile == "firstAccepted" and not spec.type.runs_to_completion:
            wins = "the replacement stays once it runs"  # there is no result to wait for
        after = _duration(policy.after_seconds)
        text = f"replace after {after}: a new attempt begins elsewhere; {wins}"
    return f"{text} ({policy.why})"


def disconnect_warnings(spec: JobSpec) -> tuple[str, ...]:
    """What a user wrote of the policy although nothing comes of it."""
    policy, given = effective_disconnect(spec), spec.disconnect
    if policy.action != "hold":
        return ()
    remedy = "stop" if spec.type.is_per_node else "replace or stop"
    fields = {"after": given.after_seconds, "reconcile": given.reconcile}
    return tuple(
        f"spec.disconnect.{name} has no effect with hold ({policy.why}); set action: {remedy}"
        for name, value in fields.items()
        if value is not None
    )


def _duration(seconds: int) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds % length == 0:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def has_local_inputs(spec: JobSpec) -> bool:
    """True if an input lies on the node itself, so that another node may not have it."""
    types = (item.source.type.lower() for item in spec.task.input_sources)
    return any(kind in _LOCAL_SOURCES for kind in types)


def _action(spec: JobSpec) -> tuple[Action, str]:
    asked = spec.disconnect.action
    kind = spec.type.value
    if asked == "replace" and spec.type.is_per_node:
        return (
            "hold",
            "each slot of an ops or daemon job is one node, so nothing can replace it elsewhere",
        )
    if asked is not None:
        return asked, "set by spec.disconnect.action"
    if spec.type.is_per_node:
        return "hold", f"the default for {kind} jobs"
    if spec.type is JobType.BATCH and has_local_inputs(spec):
        return (
            "hold",
            "the default for batch jobs with local inputs: another node may not have them",
        )
    return "replace", f"the default for {kind} jobs"


def _default_after(spec: JobSpec) -> int:
    return SERVICE_AFTER_SECONDS if spec.type is JobType.SERVICE else OTHER_AFTER_SECONDS
