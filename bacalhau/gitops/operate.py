"""What operators do to sources: create, set, approve, suspend, resume, restore. No HTTP here."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    InvalidError,
    NotFoundError,
    OutcomeUnknownError,
    Problem,
)
from bacalhau_api.meta import ObjectMeta, Ref, Resource, check_name
from bacalhau_api.v1.source import Approval, Source, SourceSpec, Suspension
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.gitops import restore
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Put, Why

TRIES_MAX: Final = 8


class SourceActions:
    """The writes of one process about sources, each in the name of `actor`."""

    def __init__(self, state: State, clock: Clock, ids: Ids) -> None:
        self._state = state
        self._clock = clock
        self._ids = ids

    async def ensure(self, name: str, actor: str, **changes: Any) -> Source:
        """Create a source, or change what is given of its spec. Raises InvalidError."""
        try:
            check_name(name)
            if "namespace" in changes:
                check_name(changes["namespace"])
        except ValueError as error:
            raise InvalidError([Problem("metadata.name", str(error), repr(name)[:80])]) from error
        uid = self._ids.uid()

        def change(source: Source | None) -> Source:
            if source is None:
                meta = ObjectMeta(
                    name=name,
                    namespace="",
                    uid=uid,
                    generation=1,
                    creation_timestamp=self._clock.now(),
                )
                return Source(metadata=meta, spec=SourceSpec(**changes))
            spec = source.spec.but(**changes)
            if spec == source.spec:
                return source
            return source.but(spec=spec).with_meta(generation=source.metadata.generation + 1)

        return await self._change(name, change, Why(actor, "Applied"))

    async def approve(self, name: str, actor: str, digest: str) -> Source:
        """Let the deletions go that are held back under this digest. Raises ConflictError if they
        are others by now."""

        def change(source: Source) -> Source:
            freeze = source.status.freeze
            if freeze is None or not freeze.digest:
                why = f": {freeze.message}" if freeze else ""
                raise ConflictError(
                    f"source {name} holds nothing back that could be approved{why}",
                    hint=f"see bacalhau gitops status {name}",
                    reason="NothingToApprove",
                )
            if freeze.digest != digest:
                raise ConflictError(
                    f"what source {name} holds back has changed since",
                    hint=f"look again: bacalhau gitops approve {name}",
                    reason="Changed",
                )
            approval = Approval(digest=digest, by=actor, at=self._clock.now())
            return source.but(spec=source.spec.but(approval=approval))

        return await self._existing(name, change, Why(actor, "PruneApproved"))

    async def suspend(self, name: str, actor: str, seconds: float, reason: str = "") -> Source:
        """Apply nothing for so long."""
        until = self._clock.now() + timedelta(seconds=seconds)
        pause = Suspension(until=until, by=actor, reason=reason)
        return await self._existing(
            name,
            lambda source: source.but(spec=source.spec.but(suspension=pause)),
            Why(actor, "Suspended", reason),
        )

    async def resume(self, name: str, actor: str) -> Source:
        """End a suspension early."""
        return await self._existing(
            name,
            lambda source: source.but(spec=source.spec.but(suspension=None)),
            Why(actor, "Resumed"),
        )

    async def restore(self, name: str, actor: str, ref: Ref) -> Resource:
        """Bring back what a source pruned within a day; see `gitops.restore`."""
        source = await self._read(name)
        return await restore(self._state, self._clock, self._ids, source, ref, actor)

    async def _existing(self, name: str, change: Callable[[Source], Source], why: Why) -> Source:
        def checked(source: Source | None) -> Source:
            if source is None:
                raise _no_source(name)
            return change(source)

        return await self._change(name, checked, why)

    async def _change(
        self, name: str, change: Callable[[Source | None], Source], why: Why
    ) -> Source:
        ref = Ref("Source", "", name)
        last: BacalhauError | None = None
        for _ in range(TRIES_MAX):
            found = await self._state.store.get(ref)
            source = found if isinstance(found, Source) else None
            changed = change(source)
            if changed == source:
                return changed
            put = Put(changed, found.metadata.resource_version if found else 0)
            try:
                (stored,) = await self._state.commit([put], why)
            except (ConflictError, OutcomeUnknownError) as error:
                last = error
                continue
            assert isinstance(stored, Source)
            return stored
        assert last is not None
        raise last

    async def _read(self, name: str) -> Source:
        found = await self._state.store.get(Ref("Source", "", name))
        if not isinstance(found, Source):
            raise _no_source(name)
        return found


def _no_source(name: str) -> NotFoundError:
    return NotFoundError(f"there is no source {name}", hint="see bacalhau gitops status")
