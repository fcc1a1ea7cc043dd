"""Keeps objects as a directory says: read, compare, apply, prune, report.

Everything is derived anew in each pass, from the directory, the claims and the objects; nothing
that a pass remembers is needed for the next one to be right. What is decided is in `plan`, `prune`
and `status`.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from bacalhau_api.errors import ConflictError
from bacalhau_api.meta import Ref, Resource
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.source import Claim, Drift, Source, SourceProblem, SourceStatus
from bacalhau_controllers.contract import Clock, Result
from bacalhau_controllers.controller import Watch
from bacalhau_controllers.gitops.objects import given_of
from bacalhau_controllers.gitops.plan import (
    Given,
    Memory,
    Outline,
    awaits_namespace,
    drift_of,
    outline,
)
from bacalhau_controllers.gitops.ports import Declared, Objects, Order, Tree, TreeView
from bacalhau_controllers.gitops.prune import Pruning, pruning
from bacalhau_controllers.gitops.status import failure, observed, resting
from bacalhau_controllers.state import State

logger = logging.getLogger(__name__)

_NOTHING: Final = Outline((), (), (), 0, frozenset())


@dataclass(frozen=True, slots=True)
class SourceSettings:
    """`pass_seconds` least time between two passes; `chunk` objects handed over at a time;
    `budget_seconds` after so long a pass ends, and the next one goes on; `restless_seconds` until
    the next look at a directory that did not come to rest."""

    pass_seconds: float = 0.25
    chunk: int = 500
    budget_seconds: float = 20.0
    restless_seconds: float = 2.0


class SourceReconciler:
    """Looks after one source by name. `runner` says who does, for people."""

    name = "source"
    workers = 1

    def __init__(
        self,
        state: State,
        clock: Clock,
        tree: Tree,
        objects: Objects,
        source: str,
        runner: str = "",
        settings: SourceSettings | None = None,
    ) -> None:
        self._state = state
        self._clock = clock
        self._tree = tree
        self._objects = objects
        self._ref = Ref("Source", "", source)
        self._runner = runner
        self._settings = settings or SourceSettings()
        self._memory = Memory()
        self._passed_at: float | None = None
        # What the last pass was about: changes of other objects concern nobody here.
        self._concerned: frozenset[Ref] | None = None
        # Namespaces that go once they are empty.
        self._emptying: frozenset[str] = frozenset()

    @property
    def watches(self) -> dict[str, Watch]:
        """Which changes of other kinds ask for a pass."""
        return {
            "Job": self._on_object,
            "Namespace": self._on_object,
            "Node": self._on_object,
            "RetiredJob": self._on_object,
            "Claim": self._on_claim,
        }

    @asynccontextmanager
    async def term(self, wake: Callable[[Ref], None]) -> AsyncIterator[None]:
        """See controller.HasTerm."""
        async with self._tree.watching(lambda: wake(self._ref)):
            yield

    async def reconcile(self, ref: Ref) -> Result:
        """One pass over the directory, unless the last one was just now."""
        if ref != self._ref:
            return Result()
        source = self._state.cache.get(ref)
        if not isinstance(source, Source) or source.is_deleting:
            return Result()
        now = self._clock.monotonic()
        if self._passed_at is not None:
            since = now - self._passed_at
            if 0 <= since < self._settings.pass_seconds:
                return Result(requeue_after=self._settings.pass_seconds - since)
        try:
            return await self._pass(source)
        finally:
            self._passed_at = self._clock.monotonic()

    async def _pass(self, source: Source) -> Result:
        rest = resting(source, self._clock.now())
        if rest is not None:
            await self._report(source, rest)
            until = rest.waiting.until if rest.waiting else None
            if until is None:
                return Result()
            return Result(requeue_after=max(0.05, (until - self._clock.now()).total_seconds()))
        view = await self._tree.read(source.spec)
        if view.absent_reason == "Unsettled":
            logger.info("Directory keeps changing", extra={"source": source.name})
            return Result(requeue_after=self._settings.restless_seconds)
        if source.spec.mode == "detect":
            await self._detect(source, view)
            return Result()
        return await self._enforce(source, view)

    async def _enforce(self, source: Source, view: TreeView) -> Result:
        found = self._outline(source, view)
        began = self._clock.monotonic()
        failed: dict[Ref, SourceProblem] = {}
        orders = [Order(item, view.commit) for item, _ in found.apply]
        is_cut = False
        for chunk in self._chunks(orders):
            if self._clock.monotonic() - began > self._settings.budget_seconds:
                is_cut = True
                break
            refused = {p.object for p in failed.values()}
            look = self._state.cache.get
            ready = [o for o in chunk if not awaits_namespace(o.declared, look, refused)]
            failed |= await self._apply(source, ready)
        if orders:
            found = self._outline(source, view)
        todo = self._pruning(source, view, found)
        if not is_cut:
            source = await self._prune(source, view, todo)
        still = {i.resource.ref for i, _ in found.apply} | {
            ref for ref in failed if ref not in found.refs
        }
        left = {ref: p for ref, p in failed.items() if ref in still}
        status = observed(source, view, found, left, todo, (), self._clock.now())
        await self._report(source, status.but(approved=todo.approved))
        is_open = is_cut or any(i.resource.ref not in left for i, _ in found.apply)
        if is_open:
            return Result(requeue_after=self._settings.pass_seconds)
        if left:
            return Result(requeue_after=self._settings.restless_seconds)
        return Result()

    def _chunks(self, orders: Sequence[Order]) -> Iterator[Sequence[Order]]:
        """So many at a time; namespaces, which come first, before everything else."""
        places = sum(isinstance(o.declared.resource, Namespace) for o in orders)
        chunk = self._settings.chunk
        for begin, end in ((0, places), (places, len(orders))):
            for at in range(begin, end, chunk):
                yield orders[at : min(at + chunk, end)]

    async def _apply(self, source: Source, orders: Sequence[Order]) -> dict[Ref, SourceProblem]:
        items: dict[Ref, Declared] = {o.declared.resource.ref: o.declared for o in orders}
        failed: dict[Ref, SourceProblem] = {}
        for done in await self._objects.apply(source, orders):
            if done.error is not None:
                failed[done.ref] = failure(items[done.ref], done.error)
                continue
            if all(done.versions):
                self._memory.applied(items[done.ref], source, done.versions)
            if done.outcome != "unchanged":
                logger.info(
                    "Applied object",
                    extra={
                        "source": source.name, "object": str(done.ref), "outcome": done.outcome,
                        "file": items[done.ref].file,
                    },
                )  # fmt: skip
        return failed

    async def _prune(self, source: Source, view: TreeView, todo: Pruning) -> Source:
        """Delete and let go. The list of what was approved is stored before: it has to outlive the
        deletions, should this process not."""
        if todo.delete and todo.approved != source.status.approved:
            source = await self._report(source, source.status.but(approved=todo.approved))
        chunk = self._settings.chunk
        for at in range(0, len(todo.delete), chunk):
            part = todo.delete[at : at + chunk]
            for done in await self._objects.prune(source, part, view.commit):
                logger.info(
                    "Pruned object",
                    extra={
                        "source": source.name, "object": str(done.ref), "outcome": done.outcome,
                        "error": str(done.error or ""),
                    },
                )  # fmt: skip
        if todo.release:
            await self._objects.release(source, todo.release, "its file is gone, prune is retain")
        if todo.gone:
            await self._objects.release(source, todo.gone, "the object is gone")
        return source

    async def _detect(self, source: Source, view: TreeView) -> None:
        found = self._outline(source, view)
        todo = self._pruning(source, view, found)
        gone = [
            Drift(object=str(c.spec.object_ref), action="delete", file=c.spec.file)
            for c in todo.delete
        ]
        drift = (*drift_of(found.apply), *gone)
        now = self._clock.now()
        await self._report(source, observed(source, view, found, {}, todo, drift, now))

    # -- reading ---------------------------------------------------------------------------------

    def _outline(self, source: Source, view: TreeView) -> Outline:
        if view.absent:
            return _NOTHING
        found = outline(view, self._given(source), self._memory)
        held = {claim.spec.object_ref for claim in self._held(source)}
        self._concerned = found.refs | held
        return found

    def _pruning(self, source: Source, view: TreeView, found: Outline) -> Pruning:
        todo = pruning(view, found.refs, self._held(source), self._given(source))
        self._emptying = frozenset(claim.spec.name for claim in todo.inhabited)
        return todo

    def _held(self, source: Source) -> list[Claim]:
        claims = self._state.cache.owned_by(source.metadata.uid, "Claim")
        return [c for c in claims if isinstance(c, Claim) and c.is_held]

    def _given(self, source: Source) -> Given:
        return given_of(source, self._state, self._clock)

    async def _report(self, source: Source, status: SourceStatus) -> Source:
        """Store the status if it differs. Where the source was changed meanwhile, the next pass
        tells."""
        status = status.but(runner=self._runner, path=self._tree.path)
        if status == source.status:
            return source
        try:
            return await self._objects.report(source, status)
        except ConflictError as error:
            raise ConflictError(f"the source was changed meanwhile: {error.message}") from error

    # -- what asks for a pass --------------------------------------------------------------------

    def _on_object(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        changed = new or old
        if changed is None or not (self._is_concerned(changed) or self._is_leaving(old, new)):
            return ()
        if old is not None and new is not None and _is_same_wish(old, new):
            return ()
        return (self._ref,)

    def _on_claim(self, old: Resource | None, new: Resource | None) -> Iterable[Ref]:
        changed = new or old
        if not isinstance(changed, Claim):
            return ()
        ref = changed.spec.object_ref
        if self._concerned is not None and ref not in self._concerned:
            return ()
        return (self._ref,)

    def _is_leaving(self, old: Resource | None, new: Resource | None) -> bool:
        """Whether a namespace that is to go has one object less."""
        return old is not None and new is None and old.ref.namespace in self._emptying

    def _is_concerned(self, item: Resource) -> bool:
        if self._concerned is None:
            return True
        return (
            Ref("Job" if item.kind == "RetiredJob" else item.kind, item.ref.namespace, item.name)
            in self._concerned
        )


def _is_same_wish(old: Resource, new: Resource) -> bool:
    """Whether a change was of the status only."""
    a, b = old.metadata, new.metadata
    return (
        getattr(old, "spec", None) == getattr(new, "spec", None)
        and a.uid == b.uid
        and a.labels == b.labels
        and a.annotations == b.annotations
        and old.is_deleting == new.is_deleting
    )
