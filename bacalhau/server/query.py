"""What a list or a watch asks for: selectors over labels and fields, and cursors as text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bacalhau.server.problems import render
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Resource
from bacalhau_api.selectors import parse_selector, unmet
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Constraint, Job
from bacalhau_api.v1.manifest import Manifest
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.source import Claim, Source
from bacalhau_controllers.store import Cursor

SELECTOR_LENGTH_MAX = 8192


def _phase(item: Resource) -> str | None:
    if isinstance(item, (Job, Execution, Publication, Source, Claim)):
        return str(item.status.phase)
    return None


def _source(item: Resource) -> str | None:
    return item.spec.source if isinstance(item, Claim) else None


def _node(item: Resource) -> str | None:
    if isinstance(item, Node):
        return item.name
    if isinstance(item, (Execution, Publication, Acceptance, Manifest)):
        return item.spec.node
    return None


def _job(item: Resource) -> str | None:
    if isinstance(item, Job):
        return item.name
    if isinstance(item, (Execution, Publication, Acceptance, Manifest)):
        return item.spec.job
    return None


def _contact(item: Resource) -> str | None:
    if isinstance(item, (Execution, Publication, Node)):
        return str(item.status.contact)
    return None


def _membership(item: Resource) -> str | None:
    return str(item.spec.membership) if isinstance(item, Node) else None


def _type(item: Resource) -> str | None:
    if isinstance(item, Job):
        return str(item.spec.type)
    return str(item.spec.job_type) if isinstance(item, Execution) else None


FIELDS: Final[dict[str, Callable[[Resource], str | None]]] = {
    "name": lambda item: item.name,
    "metadata.name": lambda item: item.name,
    "namespace": lambda item: item.ref.namespace,
    "metadata.namespace": lambda item: item.ref.namespace,
    "uid": lambda item: item.metadata.uid,
    "phase": _phase,
    "status.phase": _phase,
    "node": _node,
    "spec.node": _node,
    "job": _job,
    "spec.job": _job,
    "contact": _contact,
    "status.contact": _contact,
    "membership": _membership,
    "spec.membership": _membership,
    "source": _source,
    "spec.source": _source,
    "type": _type,
    "spec.type": _type,
}

_CONSTANT: Final = frozenset({"name", "namespace", "uid", "node", "job"})


@dataclass(frozen=True, slots=True)
class FieldTest:
    """One requirement on a field: equal to `value`, or not if `negated`."""

    field: str
    value: str
    negated: bool = False

    def holds(self, item: Resource) -> bool:
        """Whether an object fulfils it. Letter case does not count: `phase=running` is fine."""
        found = FIELDS[self.field](item)
        return (found is not None and found.lower() == self.value.lower()) != self.negated


@dataclass(frozen=True, slots=True)
class Selection:
    """Which objects of a kind are meant."""

    kind: str
    namespace: str | None = None
    labels: tuple[Constraint, ...] = ()
    fields: tuple[FieldTest, ...] = ()

    def holds(self, item: Resource) -> bool:
        """Whether an object is one of them."""
        if item.kind != self.kind:
            return False
        if self.namespace is not None and item.ref.namespace != self.namespace:
            return False
        if not all(test.holds(item) for test in self.fields):
            return False
        if not self.labels:
            return True
        labels = item.labels if isinstance(item, Node) else item.metadata.labels
        return not unmet(self.labels, labels)

    def may_have_held(self, item: Resource) -> bool:
        """False if an object can never have been one of them, by what never changes about it."""
        constant = [test for test in self.fields if test.field.split(".")[-1] in _CONSTANT]
        return Selection(self.kind, self.namespace, fields=tuple(constant)).holds(item)

    @property
    def is_plain(self) -> bool:
        """True if nothing but kind and namespace is asked for."""
        return not self.labels and not self.fields


def select(kind: str, namespace: str | None, label_selector: str, field_selector: str) -> Selection:
    """Build a selection from query texts. Raises InvalidError naming the parameter."""
    for name, text in (("labelSelector", label_selector), ("fieldSelector", field_selector)):
        if len(text) > SELECTOR_LENGTH_MAX:
            message = f"is longer than {SELECTOR_LENGTH_MAX} characters"
            raise InvalidError([Problem(name, message)])
    return Selection(
        kind,
        namespace,
        parse_selector(label_selector) if label_selector.strip() else (),
        parse_fields(field_selector),
    )


def parse_fields(text: str) -> tuple[FieldTest, ...]:
    """Parse `phase=Running,node!=edge-1`. Raises InvalidError."""
    return tuple(_field_test(part.strip()) for part in text.split(",") if part.strip())


def _field_test(part: str) -> FieldTest:
    for sign, negated in (("!=", True), ("==", False), ("=", False)):
        field, found, value = part.partition(sign)
        if not found:
            continue
        field = field.strip()
        if field not in FIELDS:
            raise _bad_field(part, "names a field that cannot be selected on")
        return FieldTest(field, value.strip(), negated)
    raise _bad_field(part, "is not of the form FIELD=VALUE or FIELD!=VALUE")


def _bad_field(part: str, message: str) -> InvalidError:
    known = ", ".join(field for field in FIELDS if "." not in field)
    return InvalidError([Problem("fieldSelector", message, render(part), f"fields: {known}")])


def cursor_text(cursor: Cursor | None) -> str:
    """A cursor as clients see it, in `resourceVersion` of lists and as id of watch events."""
    return f"{cursor.revision}.{cursor.epoch}" if cursor else ""


def parse_cursor(text: str, present: Cursor | None) -> Cursor | None:
    """The other way; None for an empty text. A bare number is taken as one of the present store.
    Raises InvalidError."""
    if not text:
        return None
    revision, dot, epoch = text.partition(".")
    if not (revision.isascii() and revision.isdigit() and len(revision) < 19):
        hint = "give back the resourceVersion of a list or the id of a watch event as it was"
        problem = Problem("resourceVersion", "is not one this server gave", render(text), hint)
        raise InvalidError([problem])
    if not dot:
        epoch = present.epoch if present else ""
    return Cursor(epoch, int(revision))


def sort_key(sort: str) -> tuple[Callable[[Resource], tuple[str, ...]], bool]:
    """The key function and direction for `name`, `created`, `-name`, `-created`."""
    is_by_name = sort.removeprefix("-") == "name"
    return _by_name if is_by_name else _by_age, sort.startswith("-")


def _by_name(item: Resource) -> tuple[str, ...]:
    return (item.ref.namespace, item.name)


def _by_age(item: Resource) -> tuple[str, ...]:
    created = item.metadata.creation_timestamp
    # ISO texts with a fixed number of digits sort like the times they stand for.
    when = created.isoformat(timespec="microseconds") if created else ""
    return (when, item.ref.namespace, item.name)


def select_sorted(items: Sequence[Resource], selection: Selection, sort: str) -> list[Resource]:
    """The objects that are meant, in order."""
    key, is_reversed = sort_key(sort)
    chosen = items if selection.is_plain else [item for item in items if selection.holds(item)]
    return sorted(chosen, key=key, reverse=is_reversed)
