"""What users do to objects: create, apply, stop, rerun, suspend, delete, and the node verbs.

Each is a read, a pure decision, and a compare-and-set, tried again when somebody else was faster.
No HTTP here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from bacalhau.server.ports import Services
from bacalhau_api.admission import admit_job, admit_node, rerun_failed, revive
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
from bacalhau_api.meta import DEFAULT_NAMESPACE, ObjectMeta, Ref, Resource, check_name
from bacalhau_api.names import check_label_key, check_label_value
from bacalhau_api.provenance import Provenance, provenance_of, stamped, without_reserved
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Membership, Node, NodeSpec
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_controllers.disconnect import disconnect_warnings
from bacalhau_controllers.store import Delete, Put, Why, Write

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
        self,
        submitted: Job,
        actor: str,
        *,
        dry_run: bool = False,
        create_only: bool = False,
        provenance: Provenance | None = None,
        reason: str = "",
        is_canonical: bool = False,
    ) -> Applied:
        """Create a job or change it to what was submitted. `reason` replaces the history's usual
        words; with it the run itself is asked for, so `onChange` does not hold it back. With
        `is_canonical` it comes from `parse_manifests`, and is not checked again.

        Raises InvalidError, ConflictError.
        """
        origin = provenance or Provenance()
        services = self._services
        # One for each try: an earlier one may have been stored, and the job deleted since.
        uids: list[str] = []
        _check_names(submitted)
        outcome = ""
        for attempt in range(TRIES_MAX):
            # The cache is right but for moments, and compare-and-set finds those.
            existing = await self._read(submitted.ref, Job, is_fresh=attempt > 0)
            is_mine = existing is not None and existing.metadata.uid in uids
            uids.append(services.ids.uid())
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
            retired = await self._retired(submitted.ref, existing, is_fresh=attempt > 0)
            admitted = admit_job(
                existing,
                submitted,
                now=services.clock.now(),
                uid=uids[-1],
                namespace=self._namespace(submitted.ref.namespace),
                # Who creates, rather than applies, asks for a run.
                retired=retired if not create_only else None,
                is_explicit=bool(reason),
                is_canonical=is_canonical,
            )
            if admitted.outcome == "unchanged" and attempt == 0:
                continue  # a promise about the present: look at the store itself
            outcome = admitted.outcome if not outcome or not is_mine else outcome
            warnings = (*admitted.warnings, *disconnect_warnings(admitted.job.spec))
            if dry_run or admitted.outcome == "unchanged":
                return Applied(admitted.job, outcome, warnings)
            word = reason or ("Created" if admitted.outcome == "created" else "Applied")
            job = stamped(admitted.job, origin)
            try:
                stored = await self._replace(
                    existing, job, Why(actor, word, origin.words()), retired
                )
            except (ConflictError, OutcomeUnknownError) as error:
                last: BacalhauError = error
                continue
            return Applied(stored, outcome, warnings)
        raise last

    async def apply_node(
        self,
        submitted: Node,
        actor: str,
        *,
        dry_run: bool = False,
        provenance: Provenance | None = None,
        reason: str = "Applied",
    ) -> Applied:
        """Change what operators say of a node: labels, annotations, and the given spec fields."""
        outcome = "unchanged"
        origin = provenance or Provenance()

        def change(node: Node) -> Node:
            nonlocal outcome
            admitted = admit_node(node, submitted)
            outcome = admitted.outcome
            return admitted.node if outcome == "unchanged" else stamped(admitted.node, origin)

        _check_labels(submitted)
        why = Why(actor, reason, origin.words())
        node = await self._change(submitted.ref, Node, change, why, dry_run)
        return Applied(node, outcome)

    async def roll_back(
        self, old: Resource, revision: int, actor: str, *, message: str = ""
    ) -> Applied:
        """Have an object be again what it was at a revision: for a job its spec, as a new
        generation if that affects execution; for a node what operators say of it.

        Raises InvalidError for kinds that controllers write.
        """
        words = f"to revision {revision}{f': {message}' if message else ''}"
        origin = provenance_of(old).but(message=words)
        if isinstance(old, Job):
            live = await self._read(old.ref, Job, is_fresh=True)
            meta = (live or old).metadata
            given = ObjectMeta(
                name=meta.name,
                namespace=meta.namespace,
                labels=meta.labels,
                annotations=without_reserved(meta.annotations),
            )
            submitted = Job(metadata=given, spec=old.spec)
            return await self.apply_job(submitted, actor, provenance=origin, reason="RolledBack")
        if isinstance(old, Node):
            spec = NodeSpec(
                unschedulable=old.spec.unschedulable, drain=old.spec.drain, taints=old.spec.taints
            )
            node = Node(metadata=ObjectMeta(name=old.name, labels=old.metadata.labels), spec=spec)
            return await self.apply_node(node, actor, provenance=origin, reason="RolledBack")
        hint = "roll its job back instead"
        message = "is written by controllers and cannot be rolled back"
        raise InvalidError([Problem(old.kind.lower(), message, hint=hint)])

    async def stop_job(self, ref: Ref, actor: str, message: str = "") -> Job:
        """Stop the present generation. Stopping twice, or what has ended, changes nothing."""

        def change(job: Job) -> Job:
            return job if job.is_stopped or job.is_over else stopped(job)

        return await self._change(ref, Job, change, Why(actor, "Stopped", message))

    async def rerun_job(
        self, ref: Ref, actor: str, nonce: str, *, only_failed: bool = False
    ) -> Job:
        """Run an unchanged job again, as a new generation. The same nonce runs it once. One that
        ended and was retired is made anew. With `only_failed` its generation goes on with the
        slots that hold no result."""
        if only_failed:
            return await self._retry_failed(ref, actor, nonce)
        why = Why(actor, "RerunRequested")
        retired = await self._retired(ref, self._state.cache.get(ref), is_fresh=True)
        if retired is not None and await self._state.store.get(ref) is None:
            services = self._services
            made = revive(retired, nonce, now=services.clock.now(), uid=services.ids.uid())
            try:
                return await self._replace(None, made, why, retired)
            except ConflictError:
                pass  # somebody else was faster: it is there now
        return await self._change(ref, Job, lambda job: with_nonce(job, nonce), why)

    async def _retry_failed(self, ref: Ref, actor: str, nonce: str) -> Job:
        try:
            why = Why(actor, "RetryRequested")
            return await self._change(ref, Job, lambda job: rerun_failed(job, nonce), why)
        except NotFoundError:
            if await self._retired(ref, None, is_fresh=True) is None:
                raise
            raise ConflictError(
                f"{ref} has ended and was retired, with its results",
                hint=f"run all of it anew: bacalhau rerun {ref.name}",
            ) from None

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

        With `force` it goes at once, whatever holds it: what it owns is cleaned up later. Raises
        ConflictError for a node that still works, unless it was rejected or with `force`.
        """
        in_doubt = ""
        for attempt in range(TRIES_MAX):
            found = await self._read(ref, Resource, is_fresh=attempt > 0)
            if found is None:
                if attempt:  # somebody else's delete, or ours with its answer lost
                    return None
                raise not_found(ref)
            if in_doubt and found.metadata.uid != in_doubt:
                return None  # it is gone; this is another one of its name, made since
            if isinstance(found, Node) and not force:
                self._check_idle(found)
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
                if isinstance(error, OutcomeUnknownError):
                    in_doubt = found.metadata.uid
                continue
            return None
        raise last

    def _check_idle(self, node: Node) -> None:
        """With the Node goes its key: nobody could tell its agent to stop what it has."""
        if node.spec.membership is Membership.REJECTED:
            return
        here = self._state.cache.on_node(node.name, "Execution")
        count = sum(isinstance(one, Execution) and not one.is_final for one in here)
        if count:
            raise ConflictError(
                f"node {node.name} has {count} open execution{'s' if count > 1 else ''}, which "
                "would run on there, since a deleted node cannot be told to stop",
                hint=f"first stop its work there with `bacalhau node reject {node.name}`, or move "
                f"it away with `bacalhau node drain {node.name}`; or delete with --force",
                reason="NodeInUse",
            )

    async def _change(
        self,
        ref: Ref,
        kind: type[R],
        change: Callable[[R], R],
        why: Why,
        dry_run: bool = False,
    ) -> R:
        in_doubt: tuple[str, BacalhauError] | None = None
        for attempt in range(TRIES_MAX):
            found = await self._read(ref, kind, is_fresh=attempt > 0)
            if found is None:
                raise not_found(ref)
            if in_doubt is not None and found.metadata.uid != in_doubt[0]:
                raise in_doubt[1]  # this is another one of its name, made since
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
                if isinstance(error, OutcomeUnknownError):
                    in_doubt = found.metadata.uid, error
        raise last

    async def _read(self, ref: Ref, kind: type[R], *, is_fresh: bool) -> R | None:
        found = await self._state.store.get(ref) if is_fresh else self._state.cache.get(ref)
        return found if isinstance(found, kind) else None

    def _namespace(self, name: str) -> Namespace | None:
        found = self._state.cache.get(Ref("Namespace", "", name))
        return found if isinstance(found, Namespace) else None

    async def _retired(
        self, ref: Ref, existing: Resource | None, *, is_fresh: bool
    ) -> RetiredJob | None:
        """What is left of an earlier job of that name, where there is none now."""
        if existing is not None:
            return None
        return await self._read(
            Ref("RetiredJob", ref.namespace, ref.name), RetiredJob, is_fresh=is_fresh
        )

    async def _replace(
        self, existing: Job | None, job: Job, why: Why, retired: RetiredJob | None
    ) -> Job:
        """Store a job; what is left of an earlier one of its name goes with it."""
        expect = existing.metadata.resource_version if existing else 0
        writes: list[Write] = [Put(job, expect)]
        if retired is not None:
            writes.append(Delete(retired.ref, retired.metadata.resource_version))
        stored = (await self._state.commit(writes, why))[0]
        assert isinstance(stored, Job)
        return stored

    async def _put(self, item: R, expect: int, why: Why) -> R:
        (stored,) = await self._state.commit([Put(item, expect)], why)
        assert isinstance(stored, type(item))
        return stored


def not_found(ref: Ref) -> NotFoundError:
    """The error for an object that is not there."""
    where = f" in namespace {ref.namespace}" if ref.namespace else ""
    option = f" -n {ref.namespace}" if ref.namespace not in ("", DEFAULT_NAMESPACE) else ""
    kind = ref.kind.lower()
    return NotFoundError(
        f"there is no {kind} {ref.name}{where}",
        hint=f"see what there is: bacalhau get {kind}s{option}; "
        f"what there was: bacalhau history {kind}/{ref.name}{option}",
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
