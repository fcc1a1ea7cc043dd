"""Answers nodes that ask what an input of a job is pinned to, or propose it.

The first proposal counts: a manifest is created, never updated, so the store decides between two
that come at one time, and who loses gets the other's. A node may ask for executions only that were
given to it. The parts of a listing come first, so that a manifest without them is never seen.
"""

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

from bacalhau_api.errors import ConflictError
from bacalhau_api.meta import ObjectMeta, OwnerReference, Ref, Resource
from bacalhau_api.names import RESERVED_KEY_PREFIX
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.manifest import (
    Manifest,
    ManifestPart,
    ManifestPartSpec,
    ManifestSpec,
    manifest_name,
    manifest_part_name,
)
from bacalhau_api.wire import PinReply, PinRequest, Refused
from bacalhau_controllers.contract import Clock
from bacalhau_controllers.lookup import ask_store, surely_job_of
from bacalhau_controllers.manifest.reconciler import GENERATIONS_KEPT
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why

ACTOR: Final = "manifests"
PARTS_MAX: Final = 200
PARTS_KEPT_MAX: Final = 2 * PARTS_MAX
"""Of all listings of one input that one execution proposes. It may list again, because of a lost
answer or a new agent; what was proposed first stays until another is pinned or the job goes."""

PART_CHARS_MAX: Final = 512 * 1024
PROPOSED_BY: Final = f"{RESERVED_KEY_PREFIX}proposed-by"
"""The label of a part that names the execution."""


class PinDesk:
    """One per orchestrator. `is_session(node, id)` tells whether that is the node's present one."""

    def __init__(self, state: State, clock: Clock, is_session: Callable[[str, str], bool]) -> None:
        self._state = state
        self._clock = clock
        self._is_session = is_session

    async def answer(self, ask: PinRequest) -> PinReply | Refused:
        """Do what is asked. Raises TransientError if the store fails: the node asks again."""
        if not self._is_session(ask.node, ask.session):
            return _refused(ask, "SessionUnknown", "this session has ended; say hello again")
        execution = await self._execution(ask)
        if execution is None:
            return _refused(ask, "ExecutionUnknown", f"{ask.execution} is not on {ask.node}")
        spec = execution.spec
        name = manifest_name(spec.job, spec.job_uid, spec.slot.generation, ask.input)
        manifest = await self._manifest(ask.namespace, name)
        if manifest is None and ask.action == "put":
            return await self._put(ask, execution, name)
        if manifest is None and ask.action == "make":
            return await self._make(ask, execution, name)
        if manifest is None or ask.action != "read":
            # Proposals that come too late are not stored: they would only be removed, and so
            # make room for the next one.
            return _reply(ask, manifest.spec if manifest else None)
        return await self._read(ask, manifest)

    async def _put(self, ask: PinRequest, execution: Execution, name: str) -> PinReply | Refused:
        if not 0 <= ask.part < PARTS_MAX or len(ask.data) > PART_CHARS_MAX:
            return _refused(
                ask, "ListingTooLong", f"the listing of input {ask.input} has too many objects"
            )
        spec = execution.spec
        meta = self._meta(execution, manifest_part_name(name, ask.digest, ask.part))
        proposed = self._state.cache.by_label("ManifestPart", PROPOSED_BY, execution.name)
        if not has_room(proposed, execution, ask.input, meta.name):
            return _refused(
                ask, "TooManyListings", f"input {ask.input} was listed in too many different ways"
            )
        part = ManifestPart(
            metadata=meta.but(labels={PROPOSED_BY: execution.name}),
            spec=ManifestPartSpec(
                job=spec.job,
                job_uid=spec.job_uid,
                generation=spec.slot.generation,
                input=ask.input,
                digest=ask.digest,
                number=ask.part,
                data=ask.data,
            ),
        )
        try:
            await self._state.commit([Put(part, 0)], Why(ACTOR, "Listed", f"node {ask.node}"))
        except ConflictError:
            # It is there: named by what the listing holds, so it is the same. If the name was
            # taken by something else after all, the node finds out by the digest.
            pass
        return _reply(ask, None)

    async def _make(self, ask: PinRequest, execution: Execution, name: str) -> PinReply | Refused:
        if ask.manifest is None or len(ask.manifest.parts) > PARTS_MAX:
            return _refused(ask, "ListingTooLong", "the proposal cannot be used")
        spec = execution.spec
        for number in range(len(ask.manifest.parts)):
            part = manifest_part_name(name, ask.manifest.digest, number)
            if await self._part(ask.namespace, part) is None:
                return _refused(ask, "PartMissing", f"part {number} is not here; propose it again")
        manifest = Manifest(
            metadata=self._meta(execution, name),
            # What the proposal says of itself is the node's word; whose it is, is not.
            spec=ask.manifest.but(
                job=spec.job,
                job_uid=spec.job_uid,
                generation=spec.slot.generation,
                input=ask.input,
                execution=execution.name,
                node=ask.node,
                time=self._clock.now(),
            ),
        )
        try:
            await self._state.commit([Put(manifest, 0)], Why(ACTOR, "Pinned", f"node {ask.node}"))
        except ConflictError:
            pass  # another was faster: that one counts
        found = await self._manifest(ask.namespace, name, must_ask=True)
        if found is None:
            return _refused(ask, "Gone", "the job was deleted meanwhile")
        return _reply(ask, found.spec)

    async def _read(self, ask: PinRequest, manifest: Manifest) -> PinReply | Refused:
        name = manifest_part_name(manifest.name, manifest.spec.digest, ask.part)
        part = await self._part(ask.namespace, name)
        if part is None:
            return _refused(ask, "PartMissing", f"the manifest has no part {ask.part}")
        return PinReply(
            node=ask.node, session=ask.session, manifest=manifest.spec, data=part.spec.data
        )

    # -- small parts -----------------------------------------------------------------------------

    async def _execution(self, ask: PinRequest) -> Execution | None:
        ref = Ref("Execution", ask.namespace, ask.execution)
        cached = self._state.cache.get(ref)
        execution = cached if isinstance(cached, Execution) else None
        if execution is None:
            execution = await ask_store(self._state, ref, Execution)
        if execution is None or execution.spec.node != ask.node:
            return None
        if not 0 <= ask.input < len(execution.spec.task.input_sources):
            return None
        spec = execution.spec
        job = await surely_job_of(self._state, ask.namespace, spec.job, spec.job_uid)
        if job is None or spec.slot.generation <= job.metadata.generation - GENERATIONS_KEPT:
            return None
        return execution

    async def _manifest(
        self, namespace: str, name: str, *, must_ask: bool = False
    ) -> Manifest | None:
        ref = Ref("Manifest", namespace, name)
        cached = self._state.cache.get(ref)
        if isinstance(cached, Manifest) and not must_ask:
            return cached
        return await ask_store(self._state, ref, Manifest)

    async def _part(self, namespace: str, name: str) -> ManifestPart | None:
        ref = Ref("ManifestPart", namespace, name)
        cached = self._state.cache.get(ref)
        if isinstance(cached, ManifestPart):
            return cached
        return await ask_store(self._state, ref, ManifestPart)

    def _meta(self, execution: Execution, name: str) -> ObjectMeta:
        spec, now = execution.spec, self._clock.now()
        owner = OwnerReference(kind="Job", name=spec.job, uid=spec.job_uid)
        identity = f"{spec.job_uid}/{name}/{now.isoformat()}"
        return ObjectMeta(
            name=name,
            namespace=execution.metadata.namespace,
            uid=hashlib.sha256(identity.encode()).hexdigest()[:32],
            creation_timestamp=now,
            owner_references=(owner,),
        )


def has_room(proposed: Iterable[Resource], execution: Execution, number: int, name: str) -> bool:
    """Whether an execution may add the part of that name to those that it `proposed` for input
    `number`. One that is there already takes no room."""
    mine = {
        part.name
        for part in proposed
        if isinstance(part, ManifestPart)
        and part.spec.job_uid == execution.spec.job_uid
        and part.spec.input == number
    }
    return len(mine | {name}) <= PARTS_KEPT_MAX


def _reply(ask: PinRequest, manifest: ManifestSpec | None) -> PinReply:
    return PinReply(node=ask.node, session=ask.session, manifest=manifest)


def _refused(ask: PinRequest, reason: str, message: str) -> Refused:
    return Refused(
        node=ask.node, session=ask.session, reason=reason, message=message, again_seconds=1.0
    )
