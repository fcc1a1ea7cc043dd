"""Compares a directory with what is stored, and decides what is to be done. Pure.

The rules of admission are those of every other way in (`forecast.changes.decide`). What is deleted,
and what is held back, is decided in `prune.py`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Literal

from bacalhau_api.meta import Ref, Resource
from bacalhau_api.provenance import Provenance, owner_of
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.source import (
    ADOPT,
    PRUNE,
    Claim,
    ClaimPhase,
    ClaimSpec,
    Drift,
    PruneRule,
    Source,
    SourceProblem,
    claim_ref,
)
from bacalhau_controllers.forecast.changes import Change, ChangeSet, Deciding, Wanted, decide
from bacalhau_controllers.gitops.ports import Declared, TreeView

Look = Callable[[Ref], Resource | None]
"""An object as it is stored."""

Stand = Literal["synced", "apply", "waiting", "failed"]

_APPLIABLE: Final = (Job, Namespace, Node)


@dataclass(frozen=True, slots=True)
class Ruling:
    """How one declared object stands. `change` is what applying it does; `problem` why it cannot
    be applied, `waits` what it waits for."""

    stand: Stand
    change: Change | None = None
    problem: SourceProblem | None = None
    waits: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """What decisions are made from. `alive` holds the uids of all sources that exist; `jobs_in`
    lists the jobs of a namespace."""

    source: Source
    look: Look
    alive: frozenset[str]
    now: datetime
    jobs_in: Callable[[str], Sequence[Resource]] = lambda namespace: ()

    def claim(self, ref: Ref) -> Claim | None:
        """The claim on an object, if it is of a source that exists."""
        found = self.look(claim_ref(ref))
        if not isinstance(found, Claim) or found.spec.source_uid not in self.alive:
            return None
        return found

    def is_ours(self, claim: Claim) -> bool:
        """Whether it is this very source's."""
        return claim.spec.source_uid == self.source.metadata.uid


Basis = tuple[Resource, str, str, int, int, int, bool]
"""Declared object, file, uid of the source; versions of the stored object, the claim, and what is
left of a retired run; whether the claim is of a source that exists."""


@dataclass(slots=True)
class Memory:
    """Rulings that hold for as long as what they were made from is the same: most of a directory
    does not change from one look to the next, and need not be decided anew."""

    rulings: dict[Ref, tuple[Basis, Ruling]] = field(default_factory=dict)

    def applied(self, item: Declared, source: Source, versions: tuple[int, int]) -> None:
        """What was applied just now is as declared, for as long as object and claim are at the
        versions that were written."""
        basis = (item.resource, item.file, source.metadata.uid, *versions, 0, True)
        self.rulings[item.resource.ref] = (basis, Ruling("synced"))

    def keep(self, refs: Mapping[Ref, object]) -> None:
        """Forget all but these."""
        for ref in [ref for ref in self.rulings if ref not in refs]:
            del self.rulings[ref]


@dataclass(frozen=True, slots=True)
class Outline:
    """What is to be done for the declared objects: `apply`, with what that changes where it is
    known beforehand (not of new objects), namespaces first. `refs` is all that the directory
    declares."""

    apply: tuple[tuple[Declared, Change | None], ...]
    problems: tuple[SourceProblem, ...]
    waits: tuple[str, ...]
    synced: int
    refs: frozenset[Ref]


def outline(view: TreeView, given: Given, memory: Memory) -> Outline:
    """Decide about everything that the directory declares."""
    first, twice = declared_once(view)
    memory.keep(first)
    apply: list[tuple[Declared, Change | None]] = []
    problems, waits, synced = list(twice.values()), list[str](), 0
    for ref, item in first.items():
        if ref in twice:
            continue
        ruling = _remembered(item, given, memory)
        synced += ruling.stand == "synced"
        if ruling.stand == "apply":
            apply.append((item, ruling.change))
        if ruling.problem is not None:
            problems.append(ruling.problem)
        if ruling.waits:
            waits.append(ruling.waits)
    refused = {p.object for p in problems}
    ready = [pair for pair in apply if not awaits_namespace(pair[0], given.look, refused)]
    if len(ready) < len(apply):
        going = {item.resource.ref for item, _ in ready}
        waits += [
            f"{item.resource.ref} waits for its namespace"
            for item, _ in apply
            if item.resource.ref not in going
        ]
    ready.sort(key=lambda pair: not isinstance(pair[0].resource, Namespace))
    return Outline(tuple(ready), tuple(problems), tuple(waits), synced, frozenset(first))


def awaits_namespace(item: Declared, look: Look, refused: Collection[str]) -> bool:
    """Whether an object is new, and its namespace is declared but could not be applied: it would be
    made without the namespace's defaults."""
    ref = item.resource.ref
    place = Ref("Namespace", "", ref.namespace)
    is_missing = bool(ref.namespace) and str(place) in refused and look(place) is None
    return is_missing and look(ref) is None


def declared_once(
    view: TreeView,
) -> tuple[dict[Ref, Declared], dict[Ref, SourceProblem]]:
    """Each declared object by its key, and a problem for each that is declared again."""
    first: dict[Ref, Declared] = {}
    twice: dict[Ref, SourceProblem] = {}
    for item in view.declared:
        ref = item.resource.ref
        other = first.setdefault(ref, item)
        if other is not item:
            at = f"{other.file}:{other.line}" if other.line else other.file
            message = f"{ref} is declared twice, first in {at}"
            twice[ref] = problem(item, "DeclaredTwice", message, "keep one of the two")
    return first, twice


def _remembered(item: Declared, given: Given, memory: Memory) -> Ruling:
    ref = item.resource.ref
    live, claim = given.look(ref), given.look(claim_ref(ref))
    retired = None if live is not None else given.look(_retired_ref(ref))
    basis: Basis = (
        item.resource,
        item.file,
        given.source.metadata.uid,
        live.metadata.resource_version if live else 0,
        claim.metadata.resource_version if claim else 0,
        retired.metadata.resource_version if retired else 0,
        isinstance(claim, Claim) and claim.spec.source_uid in given.alive,
    )
    known = memory.rulings.get(ref)
    if known is not None and known[0][0] is item.resource and known[0][1:] == basis[1:]:
        return known[1]
    ruling = rule(item, given)
    memory.rulings[ref] = (basis, ruling)
    return ruling


def rule(item: Declared, given: Given) -> Ruling:
    """Decide about one declared object."""
    ref = item.resource.ref
    live, claim = given.look(ref), given.claim(ref)
    if (wrong := check_declared(item)) is not None:
        return Ruling("failed", problem=wrong)
    if (refused := refusal(item, live, claim, given)) is not None:
        return Ruling("failed", problem=refused)
    if live is not None and live.is_deleting:
        return Ruling("waiting", waits=f"{ref} is being deleted, and is made again after that")
    if isinstance(item.resource, Node) and live is None:
        return Ruling("waiting", waits=f"{ref} has not joined yet")
    if live is None and given.look(_retired_ref(ref)) is None:
        # Sure to be made; admission looks at it once, when it is.
        return Ruling("apply")
    change = change_of(item, given)
    if change.action == "refused":
        return Ruling("failed", problem=_refused(item, change))
    if change.action == "none" and is_claimed(claim, claim_spec(item, change, claim, given)):
        return Ruling("synced", change)
    return Ruling("apply", change)


def check_declared(item: Declared) -> SourceProblem | None:
    """What a directory may not declare."""
    ref, notes = item.resource.ref, item.resource.metadata.annotations
    if not isinstance(item.resource, _APPLIABLE):
        hint = "apply it by hand: bacalhau apply"
        return problem(item, "NotDeclarable", f"a {ref.kind} cannot come from a directory", hint)
    if not ref.name:
        return problem(item, "Nameless", f"the {ref.kind} has no name", "write metadata.name")
    for key, known in ((PRUNE, ("delete", "retain")), (ADOPT, ("true", "false"))):
        if notes.get(key, known[0]) not in known:
            message = f"the annotation {key} is {notes[key]!r}"[:200]
            return problem(item, "BadAnnotation", message, f"write {known[0]} or {known[1]}")
    return None


def refusal(
    item: Declared, live: Resource | None, claim: Claim | None, given: Given
) -> SourceProblem | None:
    """Why an object is not the source's to change; None if it is."""
    ref, source = item.resource.ref, given.source
    if claim is not None and claim.is_held and not given.is_ours(claim):
        other = claim.spec
        message = (
            f"{ref} is declared by source {other.source} ({other.file}) and by source "
            f"{source.name} ({item.file})"
        )
        hint = (
            f"keep one of the two; to hand it over, let {other.source} go of it with the "
            f"annotation {PRUNE}: retain before its file goes"
        )
        return problem(item, "ClaimedTwice", message, hint)
    if live is None or live.is_deleting or isinstance(live, Node) or is_own(live, claim, given):
        return None
    if item.resource.metadata.annotations.get(ADOPT) == "true":
        return None
    message = f"{ref} exists already, and was not made by source {source.name}"
    hint = f'to take it over, add the annotation {ADOPT}: "true" to the manifest'
    return problem(item, "NotAdopted", message, hint)


def is_own(live: Resource, claim: Claim | None, given: Given) -> bool:
    """Whether an object is the source's: the very one that it claimed; or one that carries its
    mark, which only the system writes, as after `rerun` of a job that had been retired."""
    if claim is not None and given.is_ours(claim) and claim.spec.uid == live.metadata.uid:
        return claim.status.phase is not ClaimPhase.PRUNED
    return owner_of(live) == given.source.owner


def change_of(item: Declared, given: Given, *, commit: str = "", uid: str = "") -> Change:
    """What applying an object does, by the rules of admission."""
    wanted = Wanted(item.resource, item.file, item.line, item.warnings, is_parsed=True)
    changes = ChangeSet(
        wanted=(wanted,),
        owner=given.source.owner,
        provenance=Provenance(source=item.file, commit=commit),
    )
    look = given.look
    (change,) = decide(changes, Deciding(look, given.now, lambda ref: uid))
    return change


def claim_spec(
    item: Declared, change: Change, claim: Claim | None, given: Given, *, commit: str = ""
) -> ClaimSpec | None:
    """What the claim on an applied object is to say; None where there is nothing to claim, as when
    its run is over and retired."""
    ref, source = item.resource.ref, given.source
    stored = change.new if change.action in ("create", "change") else change.old
    ours = claim.spec if claim is not None and given.is_ours(claim) else None
    if stored is None and ours is None:
        return None
    return ClaimSpec(
        source=source.name,
        source_uid=source.metadata.uid,
        kind=ref.kind,
        namespace=ref.namespace,
        name=ref.name,
        uid=stored.metadata.uid if stored else ours.uid if ours else "",
        file=item.file,
        commit=commit if change.action != "none" or ours is None else ours.commit,
        prune=prune_rule(item.resource),
    )


def is_claimed(claim: Claim | None, spec: ClaimSpec | None) -> bool:
    """Whether a claim is there as it is to be."""
    return spec is None or (claim is not None and claim.is_held and claim.spec == spec)


def prune_rule(resource: Resource) -> PruneRule:
    """What a manifest or an object says of its own deletion. Nodes are machines, not wishes: they
    are never deleted because a file is gone."""
    retain = resource.metadata.annotations.get(PRUNE) == "retain" or isinstance(resource, Node)
    return "retain" if retain else "delete"


def drift_of(apply: Iterable[tuple[Declared, Change | None]]) -> tuple[Drift, ...]:
    """What is to be applied, as differences for mode detect."""
    found = []
    for item, change in apply:
        if change is not None and change.action not in ("create", "change"):
            continue  # only the claim is to be written
        action: Literal["create", "change"] = "create"
        if change is not None and change.action == "change":
            action = "change"
        fields = tuple(f.field for f in change.fields[:20]) if change else ()
        ref = str(item.resource.ref)
        found.append(
            Drift(object=ref, action=action, file=item.file, line=item.line, fields=fields)
        )
    return tuple(found)


def problem(item: Declared, reason: str, message: str, hint: str = "") -> SourceProblem:
    """A problem of one declared object."""
    return SourceProblem(
        file=item.file,
        line=item.line,
        object=str(item.resource.ref),
        reason=reason,
        message=message,
        hint=hint,
    )


def _retired_ref(ref: Ref) -> Ref:
    return Ref("RetiredJob", ref.namespace, ref.name)


def _refused(item: Declared, change: Change) -> SourceProblem:
    first = change.problems[0]
    text = f"{first.field}: {first.message}" if first.field else first.message
    more = f" (and {len(change.problems) - 1} more)" if len(change.problems) > 1 else ""
    return problem(item, "Refused", text + more, first.hint)
