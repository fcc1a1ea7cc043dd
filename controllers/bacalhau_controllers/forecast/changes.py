"""What a set of documents means against what is stored: created, changed, unchanged, pruned,
refused. Pure; the rules are those of admission.

The set may belong to an *owner*, such as a watched directory. An owner brings its inventory: what
it applied before, with uids. What is in the inventory and no longer declared is pruned, unless
another object has the name by now, or another owner took it over.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, Literal, NamedTuple

from bacalhau_api.admission import HELD_SPEC, Admitted, admit_job, admit_namespace, admit_node
from bacalhau_api.compare import Difference, compare
from bacalhau_api.errors import BacalhauError, InvalidError, Problem, TerminalError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.provenance import Provenance, owner_of, stamped
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_controllers.disconnect import disconnect_warnings
from bacalhau_controllers.store import Delete, Put, Write

View = Callable[[Ref], Resource | None]
"""Looks an object up as it is stored."""

Action = Literal["create", "change", "none", "delete", "refused", "affected"]
"""`affected` is never the outcome for a document: it is said of others that a change reaches."""

Run = Literal["", "first", "rerun", "update", "held", "ignored", "retired", "ends"]
"""What it means for runs: a first one, a new one, a rollout (service, daemon); kept back until
`rerun`, left out (`onChange`), over and done with; the job ends."""

CHANGES_MAX: Final = 500


@dataclass(frozen=True, slots=True)
class Wanted:
    """One document: an object in canonical form, and where it was declared. `is_parsed`: it is as
    `parse_manifests` made it, and was checked there."""

    resource: Resource
    source: str = ""
    line: int = 0
    warnings: tuple[str, ...] = ()
    is_parsed: bool = False


class Owned(NamedTuple):
    """One entry of an owner's inventory."""

    ref: Ref
    uid: str


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """What somebody wants. `inventory` is what `owner` applied before; of it, what `wanted` does
    not declare any more is pruned if `prune` is set. `provenance.source` is that of documents
    which have no source of their own."""

    wanted: tuple[Wanted, ...] = ()
    owner: str = ""
    inventory: tuple[Owned, ...] = ()
    prune: bool = False
    provenance: Provenance = field(default_factory=Provenance)


@dataclass(frozen=True, slots=True)
class Change:
    """The outcome for one object. `new` is as it is to be stored; `problems` say why it is refused."""

    action: Action
    ref: Ref
    old: Resource | None = None
    new: Resource | None = None
    fields: tuple[Difference, ...] = ()
    run: Run = ""
    source: str = ""
    line: int = 0
    provenance: Provenance = field(default_factory=Provenance)
    warnings: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    retired: RetiredJob | None = None

    @property
    def writes(self) -> tuple[Write, ...]:
        """What has to be written for it."""
        if self.action not in ("create", "change", "delete") or self.new is None:
            if self.action == "delete" and self.old is not None:
                return (Delete(self.ref, self.old.metadata.resource_version),)
            return ()
        writes: list[Write] = [Put(self.new, self.old.metadata.resource_version if self.old else 0)]
        if self.retired is not None:
            writes.append(Delete(self.retired.ref, self.retired.metadata.resource_version))
        return tuple(writes)


@dataclass(frozen=True, slots=True)
class Deciding:
    """What decisions need beside the documents. `uid_of` names the identity of a new object."""

    view: View
    now: datetime
    uid_of: Callable[[Ref], str]


def decide(changes: ChangeSet, given: Deciding) -> tuple[Change, ...]:
    """The outcome for each document in order, then for what is pruned. Nothing is raised for what
    is wrong with one document: it is refused, with its problems. Jobs are given the defaults of
    their namespace as this very set has it, wherever in the set it stands.

    Raises InvalidError for a set that is wrong as such.
    """
    _check(changes)
    places = {
        wanted.resource.ref: _decide(wanted, changes, given)
        for wanted in changes.wanted
        if isinstance(wanted.resource, Namespace)
    }
    within = replace(given, view=_with(places, given.view)) if places else given
    found = [
        places.get(wanted.resource.ref) or _decide(wanted, changes, within)
        for wanted in changes.wanted
    ]
    if changes.prune:
        declared = {wanted.resource.ref for wanted in changes.wanted}
        found += _prune(changes, declared, given)
    return tuple(found)


def _with(places: Mapping[Ref, Change], view: View) -> View:
    """What is stored, with namespaces as they are to be."""

    def look(ref: Ref) -> Resource | None:
        change = places.get(ref)
        return change.new if change is not None and change.new is not None else view(ref)

    return look


def pruned(ref: Ref, given: Deciding, provenance: Provenance) -> Change | None:
    """The deletion of one object; None if it is gone or going."""
    live = given.view(ref)
    if live is None or live.is_deleting:
        return None
    marked = live.with_meta(deletion_timestamp=given.now) if live.metadata.finalizers else None
    run: Run = "ends" if isinstance(live, Job) else ""
    return Change("delete", ref, live, marked, run=run, provenance=provenance)


def _check(changes: ChangeSet) -> None:
    seen: dict[Ref, Wanted] = {}
    problems = []
    for wanted in changes.wanted:
        first = seen.setdefault(wanted.resource.ref, wanted)
        if first is not wanted:
            where = f"{first.source}:{first.line}" if first.source else "before"
            message = f"{wanted.resource.ref} is declared twice, first in {where}"
            problems.append(_problem(wanted, message, "keep one of the two"))
    total = len(changes.wanted) + len(changes.inventory)
    if total > CHANGES_MAX:
        message = f"has {total} objects, at most {CHANGES_MAX} go together"
        problems.append(Problem("documents", message, hint="split it into several"))
    if problems:
        raise InvalidError(problems)


def _problem(wanted: Wanted, message: str, hint: str = "") -> Problem:
    where = f"{wanted.source}:{wanted.line}" if wanted.source and wanted.line else wanted.source
    return Problem("", message, hint=hint, where=where)


def _decide(wanted: Wanted, changes: ChangeSet, given: Deciding) -> Change:
    item = wanted.resource
    provenance = changes.provenance
    if wanted.source:
        provenance = provenance.but(source=wanted.source)
    base = Change(
        "none",
        item.ref,
        given.view(item.ref),
        source=wanted.source,
        line=wanted.line,
        provenance=provenance,
        warnings=wanted.warnings,
    )
    try:
        _check_owner(base.old, changes.owner)
        if isinstance(item, Job):
            return _decide_job(base, wanted, item, changes.owner, given)
        if isinstance(item, Node):
            return _decide_node(base, item, changes.owner)
        if isinstance(item, Namespace):
            return _decide_namespace(base, item, changes.owner, given)
        raise TerminalError(f"{item.kind} objects cannot be applied")
    except InvalidError as error:
        return replace(base, action="refused", problems=error.problems)
    except BacalhauError as error:
        problem = Problem("", error.message, hint=error.hint)
        return replace(base, action="refused", problems=(problem,))


def _check_owner(live: Resource | None, owner: str) -> None:
    other = owner_of(live) if live is not None and owner else ""
    if other and other != owner:
        raise TerminalError(
            f"it is applied by {other}", hint=f"declare it in one place: in {other} or in {owner}"
        )


def _decide_job(base: Change, wanted: Wanted, item: Job, owner: str, given: Deciding) -> Change:
    live = base.old if isinstance(base.old, Job) else None
    retired = given.view(Ref("RetiredJob", item.ref.namespace, item.name)) if not live else None
    known = retired if isinstance(retired, RetiredJob) else None
    uid = given.uid_of(item.ref) if live is None else ""
    place = given.view(Ref("Namespace", "", item.ref.namespace))
    admitted = admit_job(
        live,
        item,
        now=given.now,
        uid=uid,
        namespace=place if isinstance(place, Namespace) else None,
        retired=known,
        is_canonical=wanted.is_parsed,
    )
    return _settled(base, live, admitted.job, owner, admitted, known)


def _settled(
    base: Change,
    live: Job | None,
    new: Job,
    owner: str,
    admitted: Admitted,
    retired: RetiredJob | None,
) -> Change:
    told = (*base.warnings, *admitted.warnings, *disconnect_warnings(new.spec))
    warnings = tuple(dict.fromkeys(told))
    if admitted.held == "retired":
        return replace(base, new=None, run="retired", warnings=warnings)
    is_adopted = live is not None and bool(owner) and owner_of(live) != owner
    if admitted.outcome == "unchanged" and not is_adopted:
        run: Run = "held" if HELD_SPEC in new.metadata.annotations else ""
        if admitted.held == "ignore":
            run = "ignored"
        return replace(base, new=live, run=run, warnings=warnings)
    stored = stamped(new, base.provenance, owner=owner)
    return replace(
        base,
        action="create" if live is None else "change",
        new=stored,
        fields=compare(live, _as_wished(stored)) if live is not None else (),
        run=_run(live, stored, admitted),
        warnings=warnings,
        retired=retired,
    )


def _as_wished(job: Job) -> Job:
    """With the change that is held back, which is what the user is to see."""
    text = job.metadata.annotations.get(HELD_SPEC)
    return job.but(spec=type(job.spec).decode(text)) if text else job


def _run(live: Job | None, new: Job, admitted: Admitted) -> Run:
    if live is None:
        return "first"
    if admitted.held:
        return "held" if admitted.held == "manual" else "ignored"
    if new.metadata.generation == live.metadata.generation:
        return ""
    return "rerun" if new.spec.type.runs_to_completion else "update"


def _decide_node(base: Change, item: Node, owner: str) -> Change:
    if not isinstance(base.old, Node):
        raise TerminalError(
            f"there is no node {item.name}", hint="nodes come into being by joining, not by apply"
        )
    live = base.old
    admitted = admit_node(live, item)
    if admitted.outcome == "unchanged":
        return replace(base, new=live)
    new = stamped(admitted.node, base.provenance, owner=owner)
    return replace(base, action="change", new=new, fields=compare(live, new))


def _decide_namespace(base: Change, item: Namespace, owner: str, given: Deciding) -> Change:
    live = base.old if isinstance(base.old, Namespace) else None
    uid = given.uid_of(item.ref) if live is None else ""
    admitted, outcome = admit_namespace(live, item, now=given.now, uid=uid)
    is_adopted = live is not None and bool(owner) and owner_of(live) != owner
    if outcome == "unchanged" and not is_adopted:
        return replace(base, new=live)
    new = stamped(admitted, base.provenance, owner=owner)
    fields = compare(live, new) if live is not None else ()
    return replace(base, action="create" if live is None else "change", new=new, fields=fields)


def _prune(changes: ChangeSet, declared: set[Ref], given: Deciding) -> Iterable[Change]:
    for ref, uid in changes.inventory:
        live = given.view(ref)
        if ref in declared or live is None or live.metadata.uid != uid:
            continue
        if owner_of(live) not in ("", changes.owner):
            continue
        if (change := pruned(ref, given, changes.provenance)) is not None:
            yield change
