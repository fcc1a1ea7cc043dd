"""Plans and applies sets of documents against the store: what `bacalhau plan`, `apply --plan` and
watched directories stand on.

    changes = ChangeSet(wanted=..., owner="source/prod", inventory=..., prune=True)
    plan = await applier.plan(changes)
    done = await applier.apply(changes, actor="source/prod", token=plan.token)
    # keep done.inventory: it is the `inventory` of the next set

A set is applied whole or not at all, as far as one commit can hold it (400 writes); what is pruned
follows in a commit of its own.
"""

from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, Protocol, TypeVar

from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    InvalidError,
    OutcomeUnknownError,
    Problem,
    UnavailableError,
)
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.plans import AppliedObject, AppliedSet, ChangePlan, InventoryEntry, ObjectPlan
from bacalhau_api.planwords import consequence_lines
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.forecast.changes import (
    Change,
    ChangeSet,
    Deciding,
    Owned,
    decide,
)
from bacalhau_controllers.forecast.foresee import (
    Foreseen,
    Snapshot,
    differing,
    foresee,
    without_nodes,
)
from bacalhau_controllers.forecast.token import SEED_LENGTH, another_uid, read_token, uid_for
from bacalhau_controllers.job import JobSettings
from bacalhau_controllers.placement import RuleFinding
from bacalhau_controllers.state import State
from bacalhau_controllers.store import WRITES_MAX, Changed, Cursor, Removed, Why

T = TypeVar("T")

TRIES_MAX: Final = 8
PLANS_KEPT_MAX: Final = 32
LINES_MAX: Final = 10


class Offload(Protocol):
    """Runs a forecast where it does not hold up others, such as in a thread."""

    async def __call__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await the work."""
        ...


class PlanOutdatedError(ConflictError):
    """The outcome would differ from the plan."""

    reason = "PlanOutdated"


async def _here(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    return await work()


class Applier:
    """Plans, and applies sets, on the state of one process. `settings` are those of the job
    reconciler that will act. The newest plans are remembered, so that a token alone can be applied,
    and so that a refusal can say what was planned."""

    def __init__(
        self,
        state: State,
        clock: Clock,
        ids: Ids,
        *,
        settings: JobSettings | None = None,
        offload: Offload = _here,
    ) -> None:
        self._state = state
        self._clock = clock
        self._ids = ids
        self._settings = settings or JobSettings()
        self._offload = offload
        self._plans: OrderedDict[str, tuple[ChangeSet, ChangePlan]] = OrderedDict()

    def snapshot(self) -> Snapshot:
        """Everything as it is now. Raises UnavailableError while the cache is being filled."""
        cache = self._state.cache
        if not cache.is_synced:
            raise UnavailableError("the store is still being read", hint="try again in a moment")
        objects = tuple(item for kind in _KINDS for item in cache.list(kind))
        return Snapshot(objects, self._clock.now(), _text(cache.cursor), self._settings)

    async def plan(self, changes: ChangeSet) -> ChangePlan:
        """The consequences of a set; ends in a token unless something is refused. Raises
        InvalidError for a set that is wrong as such."""
        seed = self._ids.uid()[:SEED_LENGTH]
        found = await self._foresee(changes, seed)
        if found.plan.token:
            self._plans[found.plan.token] = (changes, found.plan)
            while len(self._plans) > PLANS_KEPT_MAX:
                self._plans.popitem(last=False)
        return found.plan

    async def without_nodes(self, names: Iterable[str]) -> ChangePlan:
        """What would happen without some nodes. Raises NotFoundError."""
        snapshot, wanted = self.snapshot(), tuple(names)
        return await self._offload(lambda: without_nodes(snapshot, wanted))

    async def explain_pair(self, job: Job, node: Node) -> tuple[RuleFinding, ...]:
        """What each placement rule says of one job and one node now."""
        snapshot = self.snapshot()
        return await self._offload(lambda: snapshot.world().explain(job, node))

    async def apply(
        self,
        changes: ChangeSet | None,
        actor: str,
        *,
        token: str = "",
        any_place: bool = False,
    ) -> AppliedSet:
        """Make a set of changes. With a token, only if the outcome is what was planned; then
        `changes` may be None if the plan is remembered here. `any_place`: other nodes than planned
        are no other outcome.

        Raises PlanOutdatedError, InvalidError (some document is refused: nothing is written),
        ConflictError.
        """
        if token:
            changes = self._set_of(token, changes)
        elif changes is None:
            raise InvalidError([], hint="give documents, or the token of a plan")
        seed = read_token(token).seed if token else self._ids.uid()[:SEED_LENGTH]
        last: BacalhauError = ConflictError("the objects changed again and again")
        done = _Done()
        for attempt in range(TRIES_MAX):
            if attempt:
                await self._read_again(changes)
            # Once part of it was written, or may have been, the outcome is no more what was
            # planned; what is left to do is.
            if token and not done.changes:
                decided = await self._as_planned(changes, token, any_place=any_place)
            else:
                decided = decide(changes, self._deciding(seed, is_again=bool(done.changes)))
            _check(decided)
            try:
                await self._commit(decided, actor, done)
            except (ConflictError, OutcomeUnknownError) as error:
                last = error
            else:
                return _applied(changes, decided, done)
        raise last

    # -- planning --------------------------------------------------------------------------------

    async def _foresee(self, changes: ChangeSet, seed: str) -> Foreseen:
        snapshot = self.snapshot()
        return await self._offload(lambda: foresee(snapshot, changes, seed))

    def _set_of(self, token: str, changes: ChangeSet | None) -> ChangeSet:
        read_token(token)
        if changes is not None:
            return changes
        if token not in self._plans:
            raise PlanOutdatedError(
                "this plan is not remembered here any more",
                hint="give its files, too: bacalhau apply -f FILE --plan TOKEN",
                reason="PlanUnknown",
            )
        return self._plans[token][0]

    async def _as_planned(
        self, changes: ChangeSet, token: str, *, any_place: bool
    ) -> tuple[Change, ...]:
        expected = read_token(token)
        found = await self._foresee(changes, expected.seed)
        what, where = differing(expected, changes, found)
        named = [*what, *([] if any_place else where)]
        if named:
            raise self._outdated(token, found.plan, named, is_place_only=not what)
        return tuple([await self._unused(change) for change in found.changes])

    async def _unused(self, change: Change) -> Change:
        """With another identity, if the planned one was there before."""
        if change.action != "create" or change.new is None:
            return change
        uid = change.new.metadata.uid
        if not await self._state.store.history(change.ref, limit=1, uid=uid):
            return change
        return replace(change, new=change.new.with_meta(uid=another_uid(uid, self._ids.uid())))

    def _outdated(
        self, token: str, now: ChangePlan, names: list[str], *, is_place_only: bool
    ) -> PlanOutdatedError:
        planned = self._plans[token][1] if token in self._plans else None
        lines: list[str] = []
        for name in names:
            new = [line for plan in _named(now, name) for line in consequence_lines(plan)]
            old = [line for plan in _named(planned, name) for line in consequence_lines(plan)]
            if planned is None:
                lines.append(f"{name}: now {'; '.join(new[:4]) or 'nothing'}")
                continue
            fresh = [line for line in new if line not in old]
            gone = [line for line in old if line not in new]
            lines.append(
                f"{name}: planned {'; '.join(gone[:3]) or 'nothing else'}, "
                f"now {'; '.join(fresh[:3]) or 'nothing else'}"
            )
        more = f" (and {len(lines) - LINES_MAX} more)" if len(lines) > LINES_MAX else ""
        hint = "look at it again: bacalhau plan"
        if is_place_only:
            hint += "; or take any place: --any-place"
        message = f"the outcome would differ from the plan: {' | '.join(lines[:LINES_MAX])}{more}"
        return PlanOutdatedError(message, hint=hint)

    # -- writing ---------------------------------------------------------------------------------

    def _deciding(self, seed: str, *, is_again: bool) -> Deciding:
        def uid_of(ref: Ref) -> str:
            uid = uid_for(seed, ref)
            return another_uid(uid, self._ids.uid()) if is_again else uid

        return Deciding(self._state.cache.get, self._clock.now(), uid_of)

    async def _read_again(self, changes: ChangeSet) -> None:
        """Learn what the store has now of everything in the set."""
        for ref in {*(w.resource.ref for w in changes.wanted), *(o.ref for o in changes.inventory)}:
            for each in (ref, Ref("RetiredJob", ref.namespace, ref.name)):
                found = await self._state.store.get(each)
                known = self._state.cache.get(each)
                if found is not None:
                    self._state.cache.learn(Changed(found))
                elif known is not None:
                    version = known.metadata.resource_version + 1
                    self._state.cache.learn(Removed(each, version))

    async def _commit(self, decided: tuple[Change, ...], actor: str, done: "_Done") -> None:
        made = [c for c in decided if c.action in ("create", "change")]
        gone = [c for c in decided if c.action == "delete"]
        reason = "Created" if all(c.action == "create" for c in made) else "Applied"
        for word, group in ((reason, made), ("Pruned", gone)):
            for part in _parts(group):
                writes = [write for change in part for write in change.writes]
                try:
                    stored = await self._state.commit(writes, Why(actor, word, _words(part)))
                except OutcomeUnknownError:
                    done.note(part, ())
                    raise
                done.note(part, stored)


@dataclass(slots=True)
class _Done:
    """What was written, or may have been, by object."""

    changes: dict[Ref, Change] = field(default_factory=dict)
    versions: dict[Ref, int] = field(default_factory=dict)

    def note(self, part: Iterable[Change], stored: Iterable[Resource | None]) -> None:
        self.changes |= {change.ref: change for change in part}
        self.versions |= {i.ref: i.metadata.resource_version for i in stored if i is not None}


def _parts(group: list[Change]) -> Iterator[list[Change]]:
    """As much at a time as one commit holds."""
    part: list[Change] = []
    size = 0
    for change in group:
        count = len(change.writes)
        if part and size + count > WRITES_MAX:
            yield part
            part, size = [], 0
        part.append(change)
        size += count
    if part:
        yield part


def _applied(changes: ChangeSet, decided: tuple[Change, ...], done: _Done) -> AppliedSet:
    declared = {change.ref for change in decided}
    pruned = [c for c in done.changes.values() if c.action == "delete" and c.ref not in declared]
    final = [done.changes.get(change.ref, change) for change in decided]
    objects = tuple(_object(change, done.versions) for change in [*final, *pruned])
    inventory = [
        InventoryEntry(kind=o.kind, namespace=o.namespace, name=o.name, uid=o.uid)
        for o in objects
        if o.outcome != "deleted"
    ]
    if not changes.prune:  # what is not declared any more stays in the owner's care
        inventory += [
            InventoryEntry(kind=ref.kind, namespace=ref.namespace, name=ref.name, uid=uid)
            for ref, uid in changes.inventory
            if ref not in declared
        ]
    return AppliedSet(objects=objects, inventory=tuple(inventory))


def _object(change: Change, versions: Mapping[Ref, int]) -> AppliedObject:
    item = change.new or change.old
    outcomes: dict[str, Literal["created", "configured", "deleted"]] = {
        "create": "created",
        "change": "configured",
        "delete": "deleted",
    }
    version = item.metadata.resource_version if item else 0
    return AppliedObject(
        kind=change.ref.kind,
        namespace=change.ref.namespace,
        name=change.ref.name,
        uid=item.metadata.uid if item else "",
        outcome=outcomes.get(change.action, "unchanged"),
        run=change.run,
        generation=item.metadata.generation if item else 0,
        resource_version=versions.get(change.ref, version),
        source=change.source,
        warnings=change.warnings,
    )


_KINDS: Final = ("Node", "Execution", "Acceptance", "Publication", "Job", "RetiredJob", "Namespace")


def inventory_of(entries: Iterable[InventoryEntry]) -> tuple[Owned, ...]:
    """An inventory as it was kept, for the next set."""
    return tuple(Owned(Ref(e.kind, e.namespace, e.name), e.uid) for e in entries)


def _check(decided: Iterable[Change]) -> None:
    """Raise InvalidError with all problems, if a document is refused."""
    problems = [
        problem if problem.where else _placed(problem, change)
        for change in decided
        for problem in change.problems
    ]
    if problems:
        raise InvalidError(problems)


def _placed(problem: Problem, change: Change) -> Problem:
    where = f"{change.source}:{change.line}" if change.line else change.source
    return replace(problem, field=problem.field or str(change.ref), where=where)


def _words(group: list[Change]) -> str:
    """The message for the history: what all of the group have in common."""
    texts = list(dict.fromkeys(change.provenance.words() for change in group))
    if len(texts) == 1:
        return texts[0]
    messages = {change.provenance.message for change in group}
    return messages.pop() if len(messages) == 1 else ""


def _named(plan: ChangePlan | None, name: str) -> list[ObjectPlan]:
    return [p for p in plan.objects if p.ref_text == name] if plan else []


def _text(cursor: Cursor | None) -> str:
    return f"{cursor.revision}.{cursor.epoch}" if cursor else ""
