"""What a job owns, by generation and slot; kept up to date object by object.

A job with 10,000 partitions changes by one execution at a time. Grouping all of them anew for each
change would cost more than everything else, so the groups are kept, and slots that hold their
result and need nothing more are set apart (*closed*): a plan only walks the open ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from bacalhau_api.meta import Resource
from bacalhau_api.v1.execution import (
    Acceptance,
    Execution,
    Phase,
    Publication,
    PublicationPhase,
    Slot,
)

SlotKey = int | str
"""A partition, or for ops and daemon jobs a node."""


@dataclass(slots=True)
class SlotView:
    """What is in one slot: its attempts in order, and the accepted result."""

    slot: Slot
    attempts: list[Execution] = field(default_factory=list)
    acceptance: Acceptance | None = None

    @property
    def next_attempt(self) -> int:
        """The number that a new attempt gets."""
        return self.attempts[-1].spec.attempt + 1 if self.attempts else 0

    @property
    def active(self) -> list[Execution]:
        """The attempts whose end was not reported."""
        return [e for e in self.attempts if not e.phase.is_final]

    @property
    def is_closed(self) -> bool:
        """Whether the slot holds its result, and nothing is left to be done about it."""
        if self.acceptance is None:
            return False
        accepted = self.acceptance.spec.execution
        return all(
            e.phase.is_final
            and (e.phase is not Phase.SUCCEEDED or e.name == accepted or e.spec.superseded)
            for e in self.attempts
        )

    def put(self, execution: Execution) -> None:
        """Add an attempt, or replace it by a newer version."""
        for i, known in enumerate(self.attempts):
            if known.name == execution.name:
                self.attempts[i] = execution
                return
        self.attempts.append(execution)
        if len(self.attempts) > 1:
            self.attempts.sort(key=lambda e: e.spec.attempt)

    def remove(self, execution: Execution) -> None:
        """Take an attempt out."""
        self.attempts = [e for e in self.attempts if e.name != execution.name]


@dataclass(slots=True)
class Group:
    """One generation. `open` are the slots that are not closed, `retried` those with more than one
    attempt, `refusals` the attempts that their nodes refused; all are keys of something else.
    `pins` is what references were resolved to, for good once an attempt was told so
    (`is_pinned`)."""

    slots: dict[SlotKey, SlotView] = field(default_factory=dict)
    open: dict[SlotKey, None] = field(default_factory=dict)
    retried: dict[SlotKey, None] = field(default_factory=dict)
    refusals: dict[str, Execution] = field(default_factory=dict)
    publications: dict[str, Publication] = field(default_factory=dict)
    undelivered: dict[str, None] = field(default_factory=dict)
    failed_deliveries: dict[str, None] = field(default_factory=dict)
    pins: dict[str, str] = field(default_factory=dict)
    is_pinned: bool = False

    @property
    def closed(self) -> int:
        """How many slots are closed. All of them hold a result."""
        return len(self.slots) - len(self.open)

    @property
    def delivered(self) -> int:
        """How many publications arrived."""
        return len(self.publications) - len(self.undelivered)

    @property
    def accepted(self) -> int:
        """How many slots hold a result."""
        return self.closed + sum(self.slots[key].acceptance is not None for key in self.open)

    def views(self) -> list[SlotView]:
        """All slots, in order."""
        return [self.slots[key] for key in sorted(self.slots, key=_order)]

    def retried_views(self) -> list[SlotView]:
        """The slots with more than one attempt, in order."""
        return [self.slots[key] for key in sorted(self.retried, key=_order)]

    def open_views(self) -> list[SlotView]:
        """The open slots, in order."""
        return [self.slots[key] for key in sorted(self.open, key=_order)]

    def active(self) -> list[Execution]:
        """The attempts that have not ended."""
        return [e for view in self.open_views() for e in view.active]

    def note_pins(self, execution: Execution) -> None:
        """Take up what an attempt was told, or reported, of references."""
        report = execution.status.report
        if execution.spec.pins:
            self.pins, self.is_pinned = execution.spec.pins, True
        elif not self.pins and report is not None and report.pins:
            self.pins = report.pins

    def note(self, key: SlotKey) -> None:
        """Sort a slot that changed into its places."""
        view = self.slots[key]
        if not view.attempts and view.acceptance is None:
            del self.slots[key]
            self.open.pop(key, None)
            self.retried.pop(key, None)
            return
        _mark(self.open, key, not view.is_closed)
        _mark(self.retried, key, len(view.attempts) > 1)


class Owned:
    """Everything one job owns."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.publications: dict[str, Publication] = {}

    @staticmethod
    def of(*lists: Iterable[Resource]) -> "Owned":
        """What these objects amount to."""
        owned = Owned()
        for resources in lists:
            for resource in resources:
                owned.put(resource)
        return owned

    @property
    def is_empty(self) -> bool:
        """True if nothing is left."""
        return not self.groups

    def put(self, resource: Resource) -> None:
        """Take in an object or its new version. Other kinds are ignored."""
        match resource:
            case Execution():
                group, key = self._place(resource.spec.slot)
                group.slots[key].put(resource)
                if resource.phase is Phase.REJECTED:
                    group.refusals[resource.name] = resource
                group.note_pins(resource)
                group.note(key)
            case Acceptance():
                group, key = self._place(resource.spec.slot)
                group.slots[key].acceptance = resource
                group.note(key)
            case Publication():
                group = self._group(resource.spec.slot)
                phase = resource.status.phase
                self.publications[resource.name] = group.publications[resource.name] = resource
                is_delivered = phase is PublicationPhase.DELIVERED
                _mark(group.undelivered, resource.name, not is_delivered)
                _mark(group.failed_deliveries, resource.name, phase is PublicationPhase.FAILED)
            case _:
                return

    def remove(self, resource: Resource) -> None:
        """Forget an object."""
        match resource:
            case Execution():
                group, key = self._place(resource.spec.slot)
                group.slots[key].remove(resource)
                group.refusals.pop(resource.name, None)
                group.note(key)
            case Acceptance():
                group, key = self._place(resource.spec.slot)
                group.slots[key].acceptance = None
                group.note(key)
            case Publication():
                group = self._group(resource.spec.slot)
                self.publications.pop(resource.name, None)
                group.publications.pop(resource.name, None)
                group.undelivered.pop(resource.name, None)
                group.failed_deliveries.pop(resource.name, None)
            case _:
                return
        if not group.slots and not group.publications:
            self.groups.pop(resource.spec.slot.generation, None)

    def _group(self, slot: Slot) -> Group:
        return self.groups.setdefault(slot.generation, Group())

    def _place(self, slot: Slot) -> tuple[Group, SlotKey]:
        group = self._group(slot)
        key = slot.node or slot.partition
        if key not in group.slots:
            group.slots[key] = SlotView(slot)
        return group, key


def _order(key: SlotKey) -> tuple[int, str]:
    return (key, "") if isinstance(key, int) else (0, key)


def _mark(marks: dict[SlotKey, None] | dict[str, None], key: SlotKey, is_so: bool) -> None:
    marked: dict[SlotKey, None] = marks  # type: ignore[assignment]
    if is_so:
        marked[key] = None
    else:
        marked.pop(key, None)
