"""What becomes of objects whose file is gone: deleted, let go, or held back. Pure.

A missing file means a wish only if the whole directory was read. Whatever else can make files
vanish (a typo, an unmounted disk, an emptied or moved directory) freezes deletions and says so.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from bacalhau_api.meta import Resource
from bacalhau_api.provenance import owner_of
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.source import Claim, Freeze
from bacalhau_controllers.gitops.plan import Given, prune_rule
from bacalhau_controllers.gitops.ports import TreeView

UID_DIGITS: Final = 12
"""Of a uid, in the list of approved deletions."""

NAMED_MAX: Final = 20
NAMED_IN_WAIT_MAX: Final = 3

FrozenFor = Literal["Broken", "Missing", "Emptied", "Unmounted", "TooMany"]


@dataclass(frozen=True, slots=True)
class Pruning:
    """`delete` may be deleted now. `release` are to be let go; `gone` have no object any more.
    `inhabited` are namespaces, to be deleted once nothing is in them; `waits` says so. `freeze`
    says what is held back, and why. `approved` is what an approval covers, to be remembered before
    anything is deleted: it has to outlive the deletions one by one."""

    delete: tuple[Claim, ...] = ()
    release: tuple[Claim, ...] = ()
    gone: tuple[Claim, ...] = ()
    inhabited: tuple[Claim, ...] = ()
    waits: tuple[str, ...] = ()
    freeze: Freeze | None = None
    approved: tuple[str, ...] = ()


def pruning(
    view: TreeView, declared: Collection[object], claims: Sequence[Claim], given: Given
) -> Pruning:
    """Decide about the held claims of a source on objects that its directory does not declare.

    `declared` holds the keys of objects that it does, `claims` all held claims of the source.
    """
    sorted_out = _sorted([c for c in claims if c.spec.object_ref not in declared], given)
    known = set(given.source.status.approved)
    surplus = [*sorted_out.delete, *sorted_out.release, *sorted_out.gone]
    if not surplus:
        return sorted_out
    if (unread := _unread(view)) is not None:
        broken = {problem.file for problem in view.problems}
        held = [c for c in sorted_out.delete if view.absent or c.spec.file not in broken]
        freeze = _freeze(*unread, held, given, can_approve=False) if held else None
        return Pruning(freeze=freeze, approved=tuple(sorted(known)), waits=sorted_out.waits)
    doubt = _doubt(view, given)
    fresh = [c for c in (surplus if doubt else sorted_out.delete) if _short(c) not in known]
    approval = given.source.spec.approval
    if fresh and approval is not None and approval.digest == digest_of(fresh):
        known |= {_short(c) for c in fresh}
        fresh = []
    doubt = doubt or _too_many(fresh, claims, given)
    held = fresh if doubt else []
    free = _without(sorted_out, held)
    return replace(
        free,
        freeze=_freeze(*doubt, held, given, can_approve=True) if doubt and held else None,
        approved=tuple(sorted(known & {_short(c) for c in surplus})),
    )


def _sorted(surplus: Sequence[Claim], given: Given) -> Pruning:
    """What each rule of its own says of the objects, before any doubt."""
    delete: list[Claim] = []
    release: list[Claim] = []
    gone: list[Claim] = []
    inhabited: list[Claim] = []
    waits: list[str] = []
    for claim in surplus:
        live = given.look(claim.spec.object_ref)
        if live is None or not is_claimed_object(claim, live, given):
            gone.append(claim)
        elif live.is_deleting:
            continue  # somebody else deletes it; it is gone at a later look
        elif is_retained(claim, live, given):
            release.append(claim)
        elif is_inhabited(live, given):
            inhabited.append(claim)
            waits.append(_inhabited(live, given))
        else:
            delete.append(claim)
    return Pruning(tuple(delete), tuple(release), tuple(gone), tuple(inhabited), tuple(waits))


def _without(whole: Pruning, held: Sequence[Claim]) -> Pruning:
    refs = {c.ref for c in held}
    delete, release, gone = (
        tuple(c for c in claims if c.ref not in refs)
        for claims in (whole.delete, whole.release, whole.gone)
    )
    return replace(whole, delete=delete, release=release, gone=gone)


def is_inhabited(live: Resource, given: Given) -> bool:
    """Whether an object is a namespace that jobs are in: it is not deleted before them, whose
    limits it holds."""
    return isinstance(live, Namespace) and bool(given.jobs_in(live.name))


def _inhabited(live: Resource, given: Given) -> str:
    jobs = sorted(job.name for job in given.jobs_in(live.name))
    named = ", ".join(jobs[:NAMED_IN_WAIT_MAX])
    more = f" and {len(jobs) - NAMED_IN_WAIT_MAX} more" if len(jobs) > NAMED_IN_WAIT_MAX else ""
    return f"{live.ref} is deleted once nothing is in it: it still has the jobs {named}{more}"


def is_claimed_object(claim: Claim, live: Resource, given: Given) -> bool:
    """Whether an object is the very one that was claimed, and nobody else took it over."""
    is_same = live.metadata.uid == claim.spec.uid
    return is_same and owner_of(live) in ("", given.source.owner)


def is_retained(claim: Claim, live: Resource, given: Given) -> bool:
    """Whether anything says that an object is to stay when its file is gone."""
    rules = (claim.spec.prune, prune_rule(live), given.source.spec.prune)
    return "retain" in rules


def digest_of(claims: Sequence[Claim]) -> str:
    """Names a set of deletions."""
    text = "\n".join(sorted(f"{c.spec.object_ref} {c.spec.uid}" for c in claims))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unread(view: TreeView) -> tuple[FrozenFor, str] | None:
    """Whether something of the directory is not known: then no absence means anything."""
    if view.absent:
        return "Missing", view.absent
    if view.problems:
        first = view.problems[0]
        at = f"{first.file}:{first.line}" if first.line else first.file
        return "Broken", f"not everything could be read, first {at}: {first.message}"
    return None


def _doubt(view: TreeView, given: Given) -> tuple[FrozenFor, str] | None:
    """Whether the directory is likely not what it was meant to be."""
    lost = [m for m in given.source.status.mounts if m not in view.mounts]
    if lost:
        return "Unmounted", f"{lost[0]} was a disk of its own, and is not mounted now"
    if not view.declared:
        return "Emptied", "the directory declares nothing at all"
    return None


def _too_many(
    fresh: Sequence[Claim], claims: Sequence[Claim], given: Given
) -> tuple[FrozenFor, str] | None:
    share = given.source.spec.max_prune_percent
    if len(fresh) <= max(1, len(claims) * share // 100):
        return None
    message = f"{len(fresh)} of {len(claims)} objects would be deleted, more than {share} %"
    return "TooMany", message


def _freeze(
    reason: FrozenFor, message: str, held: Sequence[Claim], given: Given, *, can_approve: bool
) -> Freeze:
    before = given.source.status.freeze
    since = before.since if before is not None and before.reason == reason else given.now
    names = sorted(str(c.spec.object_ref) for c in held)
    return Freeze(
        reason=reason,
        message=message[:1000],
        since=since,
        count=len(held),
        objects=tuple(names[:NAMED_MAX]),
        digest=digest_of(held) if can_approve and held else "",
    )


def _short(claim: Claim) -> str:
    return claim.spec.uid[:UID_DIGITS]
