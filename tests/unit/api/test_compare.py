"""Field-by-field differences: all that differs, and nothing that does not."""

from typing import Any

import pytest
from hypothesis import given, settings

from bacalhau_api.admission import admit_job
from bacalhau_api.compare import compare, render
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.meta import ObjectMeta
from bacalhau_api.provenance import (
    COMMIT,
    OWNER,
    SOURCE,
    Provenance,
    owner_of,
    provenance_of,
    stamped,
)
from bacalhau_api.v1.job import Job, run_hash
from tests.support.jobs import jobs
from tests.unit.api.test_admission import NOW


def job(body: str) -> Job:
    """A job whose task has these fields."""
    text = (
        "apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: {name: a}\n"
        f"spec: {{type: batch, tasks: [{{name: main, engine: {{type: noop}}, {body}}}]}}\n"
    )
    (document,) = parse_manifests(text)
    assert isinstance(document.resource, Job)
    return document.resource


def told(old: str, new: str) -> list[tuple[str, Any, Any]]:
    """The differences of two tasks, without their common path."""
    found = compare(job(old), job(new))
    return [(d.field.removeprefix("spec.tasks[main]."), d.old, d.new) for d in found]


INPUT = "{source: {type: local, params: {sourcePath: /%s}}, target: /%s}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("env: {A: x}", "env: {A: y}", [("env.A", "x", "y")]),
        ("env: {A: x}", "env: {B: x}", [("env.B", None, "x"), ("env.A", "x", None)]),
        ("resources: {cpu: 500m}", "resources: {cpu: 0.5}", []),
        ("resources: {cpu: 500m}", "resources: {cpu: 1}", [("resources.cpu", "500m", "1")]),
        (
            f"inputSources: [{INPUT % ('a', 'x')}, {INPUT % ('b', 'y')}]",
            f"inputSources: [{INPUT % ('c', 'x')}, {INPUT % ('b', 'y')}]",
            [("inputSources[/x].source.params.sourcePath", "/a", "/c")],
        ),
        (
            f"inputSources: [{INPUT % ('a', 'x')}, {INPUT % ('b', 'y')}]",
            f"inputSources: [{INPUT % ('b', 'y')}, {INPUT % ('a', 'x')}]",
            [("inputSources", ["/x", "/y"], ["/y", "/x"])],
        ),
        ("publisher: {type: local}", "env: {}", [("publisher", {"type": "local"}, None)]),
    ],
)
def test_each_difference_is_told_once(
    old: str, new: str, expected: list[tuple[str, Any, Any]]
) -> None:
    found = told(old, new)
    shown = [
        (field, {k: v for k, v in before.items() if v} if isinstance(before, dict) else before, now)
        for field, before, now in found
    ]
    assert shown == expected


@settings(max_examples=60, deadline=None)
@given(jobs(), jobs())
def test_a_run_differs_exactly_if_a_field_that_runs_does(one: Job, other: Job) -> None:
    first = admit_job(None, one, now=NOW, uid="a").job
    second = admit_job(None, other, now=NOW, uid="a").job
    if first.spec.type is not second.spec.type:
        return
    differs = any(d.runs for d in compare(first, second))
    assert differs == (run_hash(first.spec) != run_hash(second.spec))
    assert compare(first, first) == ()


def test_what_only_the_system_writes_is_no_difference() -> None:
    one = admit_job(None, job("env: {A: x}"), now=NOW, uid="a").job
    other = stamped(one, Provenance(source="a.yaml", commit="c"), owner="source/x").with_meta(
        uid="b", generation=7, resource_version=9
    )
    other = other.but(spec=other.spec.but(stop_generation=3, rerun_nonce="n"))
    assert compare(one, other) == ()


def test_provenance_is_replaced_whole_and_an_owner_stays() -> None:
    item = Job(metadata=ObjectMeta(name="a", annotations={"mine": "1"}), spec=job("env: {}").spec)
    first = stamped(item, Provenance(source="a.yaml", commit="c", by="me@here"), owner="source/x")
    assert first.metadata.annotations[SOURCE] == "a.yaml"
    second = stamped(first, Provenance(source="b.yaml"))
    assert provenance_of(second) == Provenance(source="b.yaml")
    assert COMMIT not in second.metadata.annotations
    assert second.metadata.annotations[OWNER] == owner_of(second) == "source/x"
    assert second.metadata.annotations["mine"] == "1"


def test_provenance_in_words() -> None:
    origin = Provenance(source="a.yaml", commit="0123456789abcdef", by="me@here", message="why")
    assert origin.words() == "why from a.yaml at 0123456789ab by me@here"
    assert Provenance().words() == ""
    with pytest.raises(ValueError, match="control character"):
        Provenance(by="\x1b[2J").cleaned()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "(none)"), ("", '""'), ("x", "x"), ([1, "a"], '[1, "a"]'), (True, "true"), (0, "0")],
)
def test_values_for_people(value: Any, text: str) -> None:
    assert render(value) == text
    assert len(render("x" * 1000)) == 200
