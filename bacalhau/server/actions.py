"""What users do to objects: create, apply, stop, rerun, suspend, delete, and the node verbs.

Each is a read, a pure decision, and a compare-and-set, tried again when somebody else was faster.
No HTTP here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bacalhau.server.ports import Services
from bacalhau_api.admission import admit_job
from bacalhau_api.admission import rerun as with_nonce
from bacalhau_api.admission import stop as stopped
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    InvalidError,
    NotFoundError,
    OutcomeUnknownError,
    Problem,
)
from bacalhau_api.meta import DEFAULT_NAMESPACE, Ref, Resource, check_name
from bacalhau_api.names import check_label_key, check_label_value
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.store import Delete, Put, Why

TRIES_MAX = 8

R = TypeVar("R", bound=Resource)


@dataclass(frozen=True, slots=True)
class Applied:
    """The outcome of create and apply: `created`, `configured` or `unchanged`."""

    item: Resource
    outcome: str
    warnings: tuple[str, ...] = ()


class Actions:
    """The writes of one server, each in the name of `actor` (such as `user:alice`)."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._state = services.state

    async def apply_job(
        self, submitted: Job, actor: str, *, dry_run: bool = False, create_only: bool = False
    ) -> Applied:
        """Create a job or change it to what was submitted. Raises InvalidError, ConflictError."""
        services = self._services
        uid = services.ids.uid()
        _check_names(submitted)
        outcome = ""
        for attempt in range(TRIES_MAX):
            # The cache is right but for moments, and compare-and-set finds those.
            existing = await self._read(submitted.ref, Job, is_fresh=attempt > 0)
            is_mine = existing is not None and existing.metadata.uid == uid
            if existing is not None and existing.is_deleting:
                raise ConflictError(
                    f"{existing.ref} is being deleted",
                    hint="wait until it is gone, or choose another name",
                )
            if create_only and existing is not None and not is_mine:
                hint = "choose another name, or apply (PUT) instead of create"
                raise ConflictError(
                    f"{existing.ref} exists already", hint=hint, reason="AlreadyExists"
                )
            admitted = admit_job(existing, submitted, now=services.clock.now(), uid=uid)
            if admitted.outcome == "unchanged" and attempt == 0:
                continue  # a promise about the present: look at the store itself
            outcome = admitted.outcome if not outcome or not is_mine else outcome
            if dry_run or admitted.outcome == "unchanged":
                return Applied(admitted.job, outcome, tuple(admitted.warnings))
            expect = existing.metadata.resource_version if existing else 0
            reason = "Created" if admitted.outcome == "created" else "Applied"
            try:
                stored = await self._put(admitted.job, expect, Why(actor, reason))
            except (ConflictError, OutcomeUnknownError) as error:
                last: BacalhauError = error
                continue
            return Applied(stored, outcome, tuple(admitted.warnings))
        raise last

    async def apply_node(self, submitted: Node, actor: str, *, dry_run: bool = False) -> Applied:
        """Change what operators say of a node: labels, annotations, and the given spec fields."""
        outcome = "unchanged"

        def change(node: Node) -> Node:
            nonlocal outcome
            given = submitted.spec.model_fields_set - {"public_key"}
            spec = node.spec.but(**{name: getattr(submitted.spec, name) for name in given})
            kept = submitted.metadata.model_fields_set & {"labels", "annotations"}
            meta = {name: getattr(submitted.metadata, name) for name in kept}
            changed = node.but(spec=spec).with_meta(**meta)
            outcome = "unchanged" if changed == node else "configured"
            return changed

        _check_labels(submitted)
        node = await self._change(submitted.ref, Node, change, Why(actor, "Applied"), dry_run)
        return Applied(node, outcome)

    async def stop_job(self, ref: Ref, actor: str, message: str = "") -> Job:
        """Stop the present generation. Stopping twice, or what has ended, changes nothing."""

        def change(job: Job) -> Job:
            is_over = (
                job.status.phase.is_final
                and job.status.observed_generation == job.metadata.generation
            )
            return job if job.is_stopped or is_over else stopped(job)

        return await self._change(ref, Job, change, Why(actor, "Stopped", message))

    async def rerun_job(self, ref: Ref, actor: str, nonce: str) -> Job:
        """Run an unchanged job again, as a new generation. The same nonce runs it once."""
        return await self._change(
            ref, Job, lambda job: with_nonce(job, nonce), Why(actor, "RerunRequested")
        )

    async def suspend_job(self, ref: Ref, actor: str, *, suspend: bool) -> Job:
        """Hold a job back, or let it go on."""

        def change(job: Job) -> Job:
            return job.but(spec=job.spec.but(suspend=suspend))

        reason = "Suspended" if suspend else "Resumed"
        return await self._change(ref, Job, change, Why(actor, reason))

    async def set_membership(self, name: str, actor: str, membership: Membership) -> Node:
        """Approve or reject a node."""

        def change(node: Node) -> Node:
            return node.but(spec=node.spec.but(membership=membership))

        return await self._change(Ref("Node", "", name), Node, change, Why(actor, str(membership)))

    async def set_schedulable(
        self, name: str, actor: str, *, unschedulable: bool, drain: bool
    ) -> Node:
        """Cordon, uncordon or drain a node."""

        def change(node: Node) -> Node:
            return node.but(spec=node.spec.but(unschedulable=unschedulable, drain=drain))

        reason = "Drained" if drain else "Cordoned" if unschedulable else "Uncordoned"
        return await self._change(Ref("Node", "", name), Node, change, Why(actor, reason))

    async def delete(self, ref: Ref, actor: str, *, force: bool = False) -> Resource | None:
        """Delete an object. Where finalizers hold it, it is marked and returned; else None.

        With `force` it goes at once, whatever holds it: what it owns is cleaned up later.
        """
        for attempt in range(TRIES_MAX):
            found = await self._read(ref, Resource, is_fresh=attempt > 0)
            if found is None:
                if attempt:  # somebody else's delete, or ours with its answer lost
                    return None
                raise not_found(ref)
            version = found.metadata.resource_version
            must_wait = bool(found.metadata.finalizers) and not force
            if must_wait and found.is_deleting:
                return found
            try:
                if must_wait:
                    marked = found.with_meta(deletion_timestamp=self._services.clock.now())
                    return await self._put(marked, version, Why(actor, "DeletionRequested"))
                reason = "DeletedByForce" if force else "Deleted"
                await self._state.commit([Delete(ref, version)], Why(actor, reason))
            except (ConflictError, OutcomeUnknownError) as error:
                last: BacalhauError = error
                continue
            return None
        raise last

    async def _change(
        self,
        ref: Ref,
        kind: type[R],
        change: Callable[[R], R],
        why: Why,
        dry_run: bool = False,
    ) -> R:
        for attempt in range(TRIES_MAX):
            found = await self._read(ref, kind, is_fresh=attempt > 0)
            if found is None:
                raise not_found(ref)
            if found.is_deleting:
                raise ConflictError(f"{ref} is being deleted")
            changed = change(found)
            if changed == found and attempt == 0:
                continue  # look at the store itself before saying that nothing is to be done
            if changed == found or dry_run:
                return changed
            try:
                return await self._put(changed, found.metadata.resource_version, why)
            except (ConflictError, OutcomeUnknownError) as error:
                last: BacalhauError = error
        raise last

    async def _read(self, ref: Ref, kind: type[R], *, is_fresh: bool) -> R | None:
        found = await self._state.store.get(ref) if is_fresh else self._state.cache.get(ref)
        return found if isinstance(found, kind) else None

    async def _put(self, item: R, expect: int, why: Why) -> R:
        (stored,) = await self._state.commit([Put(item, expect)], why)
        assert isinstance(stored, type(item))
        return stored


def not_found(ref: Ref) -> NotFoundError:
    """The error for an object that is not there."""
    where = f" in namespace {ref.namespace}" if ref.namespace else ""
    option = f" -n {ref.namespace}" if ref.namespace not in ("", DEFAULT_NAMESPACE) else ""
    return NotFoundError(
        f"there is no {ref.kind.lower()} {ref.name}{where}",
        hint=f"see what there is: bacalhau get {ref.kind.lower()}s{option}",
    )


def _check_names(job: Job) -> None:
    problems = []
    for field, value in (("metadata.name", job.name), ("metadata.namespace", job.ref.namespace)):
        try:
            check_name(value)
        except ValueError as error:
            problems.append(Problem(field, str(error), repr(value)[:80]))
    if problems:
        raise InvalidError(problems)


def _check_labels(node: Node) -> None:
    problems = []
    for key, value in node.metadata.labels.items():
        try:
            check_label_key(key)
            check_label_value(value)
        except ValueError as error:
            problems.append(Problem(f"metadata.labels[{key}]"[:120], str(error)))
    if problems:
        raise InvalidError(problems)
