"""Compares two objects field by field, in their canonical forms.

What only the system writes (status, bookkeeping, reserved annotations) is left out, and every
field has its effective value, so that two spellings of one meaning show no difference. Lists of
things that have names are compared by name.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from bacalhau_api.jobfile import SERVER_SPEC
from bacalhau_api.meta import Resource
from bacalhau_api.names import is_reserved
from bacalhau_api.quantity import to_quantities
from bacalhau_api.v1.job import Job, JobType, is_part_of_run

Plain = Any
"""What JSON can hold."""

_NAMES: Final = ("name", "target", "key")
"""Fields that identify an entry of a list, if every entry has one and no two are equal."""

_IDENTITY: Final = ("publicKey",)


class Difference(NamedTuple):
    """One field that differs. `field` is such as `spec.tasks[main].env.MODE`; None is absent.
    `runs`: a change of it runs a job anew."""

    field: str
    old: Plain
    new: Plain
    runs: bool = False


def comparable(resource: Resource) -> dict[str, Plain]:
    """All that users say about an object, with defaults, as plain data."""
    full = resource.model_dump(mode="json", by_alias=True)
    meta, spec = full["metadata"], full.get("spec", {})
    for name in (*SERVER_SPEC, *_IDENTITY):
        spec.pop(name, None)
    for task in spec.get("tasks", ()):
        if "resources" in task:
            task["resources"] = to_quantities(task["resources"])
    for holder in (spec.get("defaults"), spec.get("quota")):
        if isinstance(holder, dict) and isinstance(holder.get("resources"), dict):
            holder["resources"] = to_quantities(holder["resources"])
    if isinstance(spec.get("meta"), dict):
        spec["meta"] = _own(spec["meta"])
    return {
        "metadata": {name: _own(meta[name]) for name in ("labels", "annotations")},
        "spec": spec,
    }


def compare(old: Resource, new: Resource) -> tuple[Difference, ...]:
    """What differs between two versions of an object, in the order of the fields."""
    before, after = comparable(old), comparable(new)
    found = _compare(before, after, "")
    if isinstance(new, Job):
        kind = new.spec.type
        return tuple(d._replace(runs=_affects_run(d.field, kind)) for d in found)
    return tuple(found)


def render(value: Plain) -> str:
    """A value for people: short, on one line."""
    if value is None:
        return "(none)"
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:199]}…"


def _affects_run(field: str, kind: JobType) -> bool:
    head, _, rest = field.partition(".")
    if head != "spec":
        return False
    return is_part_of_run(rest.split(".")[0].split("[")[0], kind)


def _own(entries: Mapping[str, Plain]) -> dict[str, Plain]:
    return {k: v for k, v in entries.items() if not is_reserved(k)}


def _compare(old: Plain, new: Plain, path: str) -> Iterator[Difference]:
    if old == new and type(old) is type(new):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*new, *old]):
            where = f"{path}.{key}" if path else key
            yield from _compare(old.get(key), new.get(key), where)
        return
    if isinstance(old, list) and isinstance(new, list):
        yield from _compare_lists(old, new, path)
        return
    if old != new:
        yield Difference(path, old, new)


def _compare_lists(old: list[Plain], new: list[Plain], path: str) -> Iterator[Difference]:
    name = next((n for n in _NAMES if _is_named(old, n) and _is_named(new, n)), None)
    if name is None or not (old and new):
        if _are_mappings(old) and _are_mappings(new) and len(old) == len(new):
            for i, (before, after) in enumerate(zip(old, new, strict=True)):
                yield from _compare(before, after, f"{path}[{i}]")
        else:
            yield Difference(path, old, new)
        return
    before = {item[name]: item for item in old}
    after = {item[name]: item for item in new}
    for key in dict.fromkeys([*after, *before]):
        yield from _compare(before.get(key), after.get(key), f"{path}[{key}]")
    both = [key for key in after if key in before]
    if both != [key for key in before if key in after]:
        # The same entries in another order: inputs and results are mounted in theirs.
        yield Difference(path, list(before), list(after))


def _is_named(items: Sequence[Plain], name: str) -> bool:
    if not _are_mappings(items):
        return False
    names = [item.get(name) for item in items]
    return all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)


def _are_mappings(items: Sequence[Plain]) -> bool:
    return all(isinstance(item, dict) for item in items)
