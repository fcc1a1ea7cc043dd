"""What a source tells of itself: one summary from what was found and done. Pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from bacalhau_api.errors import BacalhauError, InvalidError
from bacalhau_api.meta import Ref, Waiting
from bacalhau_api.v1.source import (
    LISTED_MAX,
    Drift,
    Freeze,
    Source,
    SourceCounts,
    SourcePhase,
    SourceProblem,
    SourceStatus,
)
from bacalhau_controllers.gitops.plan import Outline
from bacalhau_controllers.gitops.ports import Declared, TreeView
from bacalhau_controllers.gitops.prune import Pruning

TEXT_MAX: Final = 1000


def resting(source: Source, now: datetime) -> SourceStatus | None:
    """The status of a source that is not to do anything now; None if it is."""
    spec, status = source.spec, source.status.but(observed_generation=source.metadata.generation)
    if spec.mode == "off":
        return status.but(phase=SourcePhase.OFF, message="the mode is off", waiting=None)
    pause = spec.suspension
    if pause is None or pause.until <= now:
        return None
    by, why = f" by {pause.by}" if pause.by else "", f": {pause.reason}" if pause.reason else ""
    message = f"suspended{by} until {pause.until:%Y-%m-%d %H:%M:%S} UTC{why}"[:TEXT_MAX]
    waiting = _waiting(source, "Suspension", message, "source reconciler", now, pause.until)
    return status.but(phase=SourcePhase.SUSPENDED, message=message, waiting=waiting)


def observed(
    source: Source,
    view: TreeView,
    found: Outline,
    failed: Mapping[Ref, SourceProblem],
    todo: Pruning,
    drift: Sequence[Drift],
    now: datetime,
) -> SourceStatus:
    """The status after a look. `found` is how things stand at its end, `failed` what could not be
    applied, `todo` what is held back or waits to be deleted; `drift` is for mode detect."""
    old, freeze = source.status, todo.freeze
    problems = (*view.problems, *found.problems, *failed.values())
    pending = [i for i, _ in found.apply if i.resource.ref not in failed]
    is_detecting = source.spec.mode == "detect"
    waits = (*found.waits, *todo.waits)
    is_whole = not (problems or freeze or waits or view.absent or pending or is_detecting)
    revision_applied = view.revision if is_whole else old.revision_applied
    counts = SourceCounts(
        files=view.files,
        objects=len(found.refs),
        synced=found.synced + (len(pending) - len(drift) if is_detecting else 0),
        waiting=len(found.waits) + (0 if is_detecting else len(pending)),
        failed=len(found.problems) + len(failed),
        drifted=len(drift),
    )
    if is_detecting:
        counts = counts.but(
            synced=max(
                0,
                counts.objects
                - counts.failed
                - counts.waiting
                - sum(d.action != "delete" for d in drift),
            )
        )
    phase, message = _summary(view, problems, freeze, drift, waits, len(pending), counts)
    return SourceStatus(
        observed_generation=source.metadata.generation,
        phase=phase,
        message=message[:TEXT_MAX],
        waiting=_mover(source, phase, message, freeze, found, now),
        runner=old.runner,
        path=old.path,
        revision_seen=view.revision or old.revision_seen,
        revision_applied=revision_applied,
        applied_at=now if revision_applied != old.revision_applied else old.applied_at,
        counts=old.counts if view.absent else counts,
        problems=problems[:LISTED_MAX],
        problems_total=len(problems),
        drift=tuple(drift[:LISTED_MAX]),
        freeze=freeze,
        approved=old.approved,
        mounts=view.mounts if not (freeze or view.absent) else old.mounts,
    )


def failure(item: Declared, error: BacalhauError) -> SourceProblem:
    """Why an object could not be applied."""
    first = error.problems[0] if isinstance(error, InvalidError) and error.problems else None
    return SourceProblem(
        file=item.file,
        line=item.line,
        object=str(item.resource.ref),
        reason=error.reason,
        message=(first.message if first else error.message)[:TEXT_MAX],
        hint=(first.hint if first else error.hint)[:TEXT_MAX],
    )


def _summary(
    view: TreeView,
    problems: Sequence[SourceProblem],
    freeze: Freeze | None,
    drift: Sequence[Drift],
    waits: Sequence[str],
    pending: int,
    counts: SourceCounts,
) -> tuple[SourcePhase, str]:
    if freeze is not None:
        what = f"{freeze.count} deletions are held back: " if freeze.count else ""
        return SourcePhase.FROZEN, f"{what}{freeze.message}"
    if view.absent:
        return SourcePhase.DEGRADED, view.absent
    if problems:
        first = problems[0]
        at = f"{first.file}:{first.line}" if first.line else first.file
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return SourcePhase.DEGRADED, f"{at}: {first.message}{more}"
    if drift:
        return SourcePhase.DRIFTED, f"{len(drift)} objects differ from the directory"
    if waits:
        more = f" (and {len(waits) - 1} more)" if len(waits) > 1 else ""
        return SourcePhase.PROGRESSING, f"{waits[0]}{more}"
    if pending and counts.waiting:
        return SourcePhase.PROGRESSING, f"{pending} objects are still to be applied"
    return SourcePhase.SYNCED, f"{counts.objects} objects are as the directory says"


def _mover(
    source: Source,
    phase: SourcePhase,
    message: str,
    freeze: Freeze | None,
    found: Outline,
    now: datetime,
) -> Waiting | None:
    """Who moves a source that is not as it should be. A person's wait has no end of its own."""
    if phase is SourcePhase.FROZEN and freeze is not None:
        what = "Approval" if freeze.digest else freeze.reason
        return _waiting(source, what, message, "user", now)
    if phase is SourcePhase.DEGRADED:
        return _waiting(source, "Files", message, "user", now)
    if phase is SourcePhase.DRIFTED:
        return _waiting(source, "Mode", "mode detect changes nothing", "user", now)
    if phase is SourcePhase.PROGRESSING and not (found.waits or found.apply):
        return _waiting(source, "EmptyNamespace", message, "whoever has the jobs in it", now)
    if phase is SourcePhase.PROGRESSING:
        return _waiting(source, "Objects", message, "source reconciler", now)
    return None


def _waiting(
    source: Source,
    what: str,
    message: str,
    mover: str,
    now: datetime,
    until: datetime | None = None,
) -> Waiting:
    old = source.status.waiting
    since = old.since if old is not None and old.what == what else now
    return Waiting(what=what, message=message[:TEXT_MAX], since=since, until=until, mover=mover)
