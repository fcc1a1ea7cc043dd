"""Changes objects in the name of a source, each together with its claim: on the store.

Object and claim go into one commit. So a process may be killed between any two writes: there is
never an object whose claim was lost, nor a claim on an object that was not made.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from functools import partial
from typing import Final

from bacalhau_api.admission import retire
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    InvalidError,
    NotFoundError,
    OutcomeUnknownError,
    Problem,
    TerminalError,
)
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.provenance import OWNER, Provenance
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.source import (
    Claim,
    ClaimPhase,
    ClaimStatus,
    Source,
    SourceProblem,
    SourceStatus,
    claim_ref,
    new_claim,
)
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.forecast.changes import Change, Deciding, pruned
from bacalhau_controllers.gitops.plan import (
    Given,
    change_of,
    check_declared,
    claim_spec,
    is_claimed,
    refusal,
)
from bacalhau_controllers.gitops.ports import Done, Order
from bacalhau_controllers.gitops.prune import is_claimed_object, is_inhabited
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Changed, Delete, Fence, Put, Removed, Why, Write
from bacalhau_controllers.tasks import until_all

logger = logging.getLogger(__name__)

TRIES_MAX: Final = 6
TOGETHER: Final = 256
"""Objects that are written at the same time: the store puts concurrent commits together."""


class StoreObjects:
    """`ports.Objects` on a store. Writes go under `fence`, or under that of the state."""

    def __init__(self, state: State, clock: Clock, ids: Ids, fence: Fence | None = None) -> None:
        self._state = state
        self._clock = clock
        self._ids = ids
        self._fence = fence

    async def apply(self, source: Source, orders: Sequence[Order]) -> Sequence[Done]:
        """See ports.Objects."""
        return await _together(
            [(o.declared.resource.ref, partial(self._apply, source, o)) for o in orders]
        )

    async def prune(self, source: Source, claims: Sequence[Claim], commit: str) -> Sequence[Done]:
        """See ports.Objects."""
        return await _together(
            [(c.spec.object_ref, partial(self._prune, source, c, commit)) for c in claims]
        )

    async def release(self, source: Source, claims: Sequence[Claim], why: str) -> Sequence[Done]:
        """See ports.Objects."""
        return await _together(
            [(c.spec.object_ref, partial(self._release, source, c, why)) for c in claims]
        )

    async def report(self, source: Source, status: SourceStatus) -> Source:
        """See ports.Objects."""
        put = Put(source.but(status=status), source.metadata.resource_version)
        (stored,) = await self._state.commit([put], self._why(source, "Observed"))
        assert isinstance(stored, Source)
        return stored

    # -- one object each -------------------------------------------------------------------------

    async def _apply(self, source: Source, order: Order) -> Done:
        """Raises what is wrong with the object, or with the store."""
        item, ref = order.declared, order.declared.resource.ref
        uid = self._ids.uid()
        last: BacalhauError | None = None
        for attempt in range(TRIES_MAX):
            if attempt:
                await self._learn(ref)
            given = self._given(source)
            live, claim = given.look(ref), given.claim(ref)
            wrong = check_declared(item) or refusal(item, live, claim, given)
            if wrong is not None:
                raise refused(wrong)
            change = change_of(item, given, commit=order.commit, uid=uid)
            if change.action == "refused":
                raise InvalidError(change.problems)
            wanted = claim_spec(item, change, claim, given, commit=order.commit)
            writes = [*change.writes]
            outcome = _outcome(change, is_adopted=claim is None)
            if wanted is not None and not is_claimed(claim, wanted):
                found = given.look(claim_ref(ref))
                made = new_claim(ref, source, wanted.uid, claim_uid=self._ids.uid(), at=given.now)
                base = claim if claim is not None and given.is_ours(claim) else made
                status = ClaimStatus(outcome=outcome, at=given.now)
                expect = found.metadata.resource_version if found else 0
                writes.append(Put(base.but(spec=wanted, status=status), expect))
            if not writes:
                return Done(ref, outcome)
            why = self._why(source, _REASONS[change.action], change.provenance.words())
            try:
                stored = await self._state.commit(writes, why)
            except (ConflictError, OutcomeUnknownError) as error:
                last = error
                continue
            return Done(ref, outcome, versions=_versions(ref, change, stored))
        assert last is not None
        raise last

    async def _prune(self, source: Source, claim: Claim, commit: str) -> Done:
        ref = claim.spec.object_ref

        def writes(held: Claim, live: Resource | None, given: Given) -> list[Write]:
            if live is None or not is_claimed_object(held, live, given):
                return [Delete(held.ref, held.metadata.resource_version)]
            if is_inhabited(live, given):
                return []
            change = pruned(ref, Deciding(given.look, given.now, lambda ref: ""), Provenance())
            if change is None:  # it is being deleted already
                return []
            status = ClaimStatus(phase=ClaimPhase.PRUNED, outcome="pruned", at=given.now)
            put = Put(held.but(status=status), held.metadata.resource_version)
            return [*change.writes, put, *self._record(live)]

        at = f" at {commit[:12]}" if commit else ""
        why = self._why(source, "Pruned", f"{claim.spec.file} does not declare it any more{at}")
        return await self._change(source, claim, writes, why, "pruned")

    def _record(self, live: Resource) -> list[Write]:
        """What stays of a run that is over: a file that comes back, as after checking out another
        branch and returning, does not run it again."""
        if not isinstance(live, Job) or not live.spec.type.runs_to_completion:
            return []
        if not live.is_over or live.is_stopped:
            return []
        record = retire(live, self._clock.now())
        found = self._state.cache.get(record.ref)
        return [Put(record, found.metadata.resource_version if found else 0)]

    async def _release(self, source: Source, claim: Claim, why: str) -> Done:
        def writes(held: Claim, live: Resource | None, given: Given) -> list[Write]:
            found: list[Write] = [Delete(held.ref, held.metadata.resource_version)]
            if live is not None and is_claimed_object(held, live, given):
                notes = {k: v for k, v in live.metadata.annotations.items() if k != OWNER}
                free = live.with_meta(annotations=notes)
                found.append(Put(free, live.metadata.resource_version))
            return found

        return await self._change(
            source, claim, writes, self._why(source, "Released", why), "released"
        )

    async def _change(
        self,
        source: Source,
        claim: Claim,
        decide: Callable[[Claim, Resource | None, Given], list[Write]],
        why: Why,
        outcome: str,
    ) -> Done:
        """Read, decide and write, for as long as others are faster. Nothing happens once the claim
        is not what it was: its object went, or it is another's."""
        ref = claim.spec.object_ref
        last: BacalhauError | None = None
        for attempt in range(TRIES_MAX):
            if attempt:
                await self._learn(ref)
            given = self._given(source)
            held = given.look(claim.ref)
            if (
                not isinstance(held, Claim)
                or not held.is_held
                or held.spec.source_uid != claim.spec.source_uid
                or held.spec.uid != claim.spec.uid
            ):
                return Done(ref, "unchanged")
            writes = decide(held, given.look(ref), given)
            if not writes:
                return Done(ref, "unchanged")
            try:
                await self._state.commit(writes, why)
            except (ConflictError, OutcomeUnknownError) as error:
                last = error
                continue
            return Done(ref, outcome)
        assert last is not None
        raise last

    # -- odds and ends ---------------------------------------------------------------------------

    def _given(self, source: Source) -> Given:
        return given_of(source, self._state, self._clock)

    def _why(self, source: Source, reason: str, message: str = "") -> Why:
        return Why(source.owner, reason, message, self._fence)

    async def _learn(self, ref: Ref) -> None:
        """Read an object, its claim and its record anew."""
        for each in (ref, claim_ref(ref), Ref("RetiredJob", ref.namespace, ref.name)):
            found, known = await self._state.store.get(each), self._state.cache.get(each)
            if found is not None:
                self._state.cache.learn(Changed(found))
            elif known is not None:
                self._state.cache.learn(Removed(each, known.metadata.resource_version + 1))


_REASONS: Final = {
    "create": "Created", "change": "Applied", "none": "Claimed", "delete": "Pruned",
    "refused": "Refused", "affected": "Affected",
}  # fmt: skip


def alive(state: State) -> frozenset[str]:
    """The uids of all sources."""
    return frozenset(source.metadata.uid for source in state.cache.list("Source"))


def given_of(source: Source, state: State, clock: Clock) -> Given:
    """What decisions about a source are made from now."""

    def jobs_in(namespace: str) -> Sequence[Resource]:
        return state.cache.list("Job", namespace)

    return Given(source, state.cache.get, alive(state), clock.now(), jobs_in)


def refused(problem: SourceProblem) -> TerminalError:
    """A problem of one declared object, as an error."""
    if problem.reason in ("ClaimedTwice", "NotAdopted"):
        return TerminalError(problem.message, hint=problem.hint, reason=problem.reason)
    at = f"{problem.file}:{problem.line}" if problem.line else problem.file
    error = InvalidError([Problem(problem.object, problem.message, hint=problem.hint, where=at)])
    error.reason = problem.reason
    return error


def _versions(ref: Ref, change: Change, stored: Sequence[Resource | None]) -> tuple[int, int]:
    """Of the object and its claim after a commit of both, or of the claim alone."""
    found = {item.ref: item.metadata.resource_version for item in stored if item is not None}
    unchanged = change.old.metadata.resource_version if change.old else 0
    claim = found.get(claim_ref(ref), 0)
    return (found.get(ref, unchanged), claim) if claim else (0, 0)


def _outcome(change: Change, *, is_adopted: bool) -> str:
    if change.action == "create":
        return "created"
    if change.run == "retired":
        return "finished"
    if is_adopted and change.old is not None:
        return "adopted"
    return "configured" if change.action == "change" else "unchanged"


async def _together(
    work: Sequence[tuple[Ref, Callable[[], Awaitable[Done]]]],
) -> Sequence[Done]:
    """Run bounded in parallel; what is wrong with one object does not stop the others."""
    done: list[Done | None] = [None] * len(work)
    numbers = iter(range(len(work)))

    async def run() -> None:
        for i in numbers:
            ref, do = work[i]
            try:
                done[i] = await do()
            except (ConflictError, TerminalError) as error:
                if error.reason == "Fenced":
                    raise
                done[i] = Done(ref, error=error)

    await until_all(run() for _ in range(min(TOGETHER, len(work))))
    return [item for item in done if item is not None]


async def restore(
    state: State, clock: Clock, ids: Ids, source: Source, ref: Ref, actor: str
) -> Resource:
    """Bring a pruned object back as it was, but with an identity of its own. It stays, whatever
    the directory says, until the directory declares it again. A job that had ended comes back with
    how it ended, and does not run.

    Raises NotFoundError (nothing of that name was pruned within a day), ConflictError (another has
    the name, or the deletion has not ended).
    """
    claim = await state.store.get(claim_ref(ref))
    if not isinstance(claim, Claim) or claim.spec.source_uid != source.metadata.uid:
        raise NotFoundError(f"source {source.name} has nothing to do with {ref}")
    if claim.status.phase is not ClaimPhase.PRUNED:
        raise NotFoundError(
            f"{ref} was not pruned", hint=f"see what was: bacalhau gitops status {source.name}"
        )
    live = await state.store.get(ref)
    if live is not None:
        going = live.is_deleting and live.metadata.uid == claim.spec.uid
        hint = "it is still being deleted: try again in a moment" if going else "delete it first"
        raise ConflictError(f"{ref} exists", hint=hint)
    entries = await state.store.history(ref, uid=claim.spec.uid)
    old = next(
        (e.resource for e in reversed(entries) if e.resource and not e.resource.is_deleting), None
    )
    now, uid = clock.now(), ids.uid()
    record: Resource | None = None
    fresh: Resource
    if isinstance(old, Job):
        record = await state.store.get(Ref("RetiredJob", ref.namespace, ref.name))
        fresh = _afresh(old, uid, now, record)
    elif isinstance(old, Namespace):
        notes = {k: v for k, v in old.metadata.annotations.items() if k != OWNER}
        fresh = old.with_meta(uid=uid, resource_version=0, annotations=notes)
    else:
        raise NotFoundError(f"the history has no {ref} any more")
    held = claim.but(
        spec=claim.spec.but(uid=fresh.metadata.uid),
        status=ClaimStatus(phase=ClaimPhase.RESTORED, outcome="restored", at=now),
    )
    writes: list[Write] = [Put(fresh, 0), Put(held, claim.metadata.resource_version)]
    if record is not None:  # it stood for the job that is there again
        writes.append(Delete(record.ref, record.metadata.resource_version))
    why = Why(actor, "Restored", f"pruned by {source.owner}")
    stored = (await state.commit(writes, why))[0]
    assert stored is not None
    return stored


def _afresh(old: Job, uid: str, now: datetime, record: Resource | None) -> Job:
    """A pruned job as it was. What had run to its end stays so: its generation is over."""
    notes = {k: v for k, v in old.metadata.annotations.items() if k != OWNER}
    meta = old.metadata.but(uid=uid, resource_version=0, annotations=notes)
    if old.is_over:
        return old.but(metadata=meta)
    if record is not None:
        raise ConflictError(
            f"{old.ref} has run to its end since, and does not start by being restored",
            hint=f"run it again: bacalhau rerun {old.name}",
            reason="HasRun",
        )
    meta = meta.but(generation=1, creation_timestamp=now)
    return Job(metadata=meta, spec=old.spec.but(stop_generation=0))


__all__ = ["StoreObjects", "alive", "refused", "restore"]
