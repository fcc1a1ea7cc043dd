"""Why a source, or an object of one, is as it is, in words. Pure."""

from bacalhau.replies import Explanation
from bacalhau_api.v1.source import Claim, ClaimPhase, Source, SourcePhase

WORDS_MAX = 20


def explain_source(source: Source) -> Explanation:
    """Explain a source by its status."""
    status, name = source.status, source.name
    because = []
    if status.path:
        because.append(f"{status.path}, looked after by {status.runner or 'nobody'}")
    if status.revision_seen:
        at = f" since {status.applied_at:%Y-%m-%d %H:%M:%S} UTC" if status.applied_at else ""
        because.append(
            f"seen {status.revision_seen[:12]}, "
            f"applied {status.revision_applied[:12] or 'nothing yet'}{at}"
        )
    for problem in status.problems[:WORDS_MAX]:
        where = f"{problem.file}:{problem.line}" if problem.line else problem.file
        because.append(f"{where}: {problem.message}")
    because += [f"held back: {text}" for text in (status.freeze.objects if status.freeze else ())]
    because += [f"{d.action} {d.object} ({d.file})" for d in status.drift[:WORDS_MAX]]
    return Explanation(
        kind="Source",
        name=name,
        phase=str(status.phase),
        headline=status.message or "no runner has looked at it yet",
        waiting=status.waiting,
        because=tuple(because),
        remedies=tuple(dict.fromkeys(_remedies(source))),
    )


def _remedies(source: Source) -> list[str]:
    status, name = source.status, source.name
    freeze = status.freeze
    found = []
    if freeze is not None and freeze.digest:
        found.append(f"look at what would go, and let it: bacalhau gitops approve {name}")
    elif freeze is not None:
        found.append("bring the directory in order; deletions go on by themselves then")
    found += [problem.hint for problem in status.problems[:WORDS_MAX] if problem.hint]
    if status.phase is SourcePhase.SUSPENDED:
        found.append(f"bacalhau gitops resume {name}")
    if status.phase in (SourcePhase.OFF, SourcePhase.DRIFTED):
        found.append(f"bacalhau gitops set {name} --mode enforce")
    if status.phase is SourcePhase.PENDING:
        found.append(f"run it: bacalhau serve --gitops {name}=DIR, or bacalhau gitops run DIR")
    return found


def explain_claim(claim: Claim) -> Explanation:
    """Explain what a source has to do with an object."""
    spec, phase = claim.spec, claim.status.phase
    ref = spec.object_ref
    words = {
        ClaimPhase.HELD: f"{ref} is kept as {spec.file} of source {spec.source} says",
        ClaimPhase.PRUNED: f"{ref} was deleted because source {spec.source} no longer declares it",
        ClaimPhase.RESTORED: f"{ref} was brought back by a user and stays",
    }
    remedies = []
    if phase is ClaimPhase.PRUNED:
        where = f" -n {ref.namespace}" if ref.namespace not in ("", "default") else ""
        target = f"{ref.kind.lower()}/{ref.name}"
        remedies.append(f"bring it back: bacalhau gitops restore {spec.source} {target}{where}")
    return Explanation(
        kind="Claim",
        namespace=claim.ref.namespace,
        name=claim.name,
        phase=str(phase),
        headline=words[phase],
        remedies=tuple(remedies),
    )
