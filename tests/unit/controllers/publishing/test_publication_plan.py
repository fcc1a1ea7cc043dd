"""What a publication's status should be."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.meta import Contact, Waiting
from bacalhau_api.v1.execution import (
    Desired,
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationStatus,
)
from bacalhau_api.v1.job import SpecConfig
from bacalhau_api.v1.node import Membership, Node
from bacalhau_controllers.node.presence import Silence
from bacalhau_controllers.publishing.plan import (
    PublicationPlan,
    View,
    merge_publication_report,
    plan,
)
from tests.support.samples import at, execution, job, node, publication, publication_report

FRESH = publication(execution(job()))
SILENCE = Silence(20, is_whole=True)
FINAL = (PublicationPhase.DELIVERED, PublicationPhase.FAILED)
GONE = Contact.UNKNOWN


def step(
    made: Publication,
    on: Node | None,
    now: float,
    *reports: PublicationReport,
    has_job: bool = True,
    has_execution: bool = True,
) -> tuple[Publication, PublicationPlan]:
    todo = plan(made, reports, View(on, has_job, has_execution, SILENCE), at(now))
    made = made.but(status=todo.status)
    if todo.stop:
        made = made.but(spec=made.spec.but(desired=Desired.STOP))
    return made, todo


def waiting(status: PublicationStatus) -> tuple[str, str]:
    assert status.waiting
    return status.waiting.what, status.waiting.mover


def test_a_delivery_from_start_to_end() -> None:
    made, todo = step(FRESH, node(), 0)
    assert waiting(made.status) == ("NodeAck", "node n1")
    assert todo.requeue_after == 60
    made, _ = step(made, node(), 1, publication_report(PublicationPhase.PUBLISHING, 1))
    assert waiting(made.status) == ("Delivery", "node n1")
    retry = Waiting(what="Retry", since=at(2), until=at(9), mover="node n1")
    told = publication_report(PublicationPhase.PUBLISHING, 2).but(waiting=retry)
    made, _ = step(made, node(), 2, told)
    assert made.status.waiting == retry  # the node's clock agrees with ours
    delivered = publication_report(PublicationPhase.DELIVERED, 3).but(
        location=SpecConfig(type="s3")
    )
    made, todo = step(made, node(), 10, delivered)
    assert (made.status.phase, made.status.waiting) == (PublicationPhase.DELIVERED, None)
    assert made.status.report == delivered
    assert todo.requeue_after is None


def test_failed_is_passed_on() -> None:
    failed = publication_report(PublicationPhase.FAILED).but(reason="NoBucket", message="404")
    made, _ = step(FRESH, node(), 0, failed)
    assert made.status.report == failed
    assert made.status.waiting is None


def test_a_silent_node_is_waited_for_without_limit() -> None:
    made, _ = step(FRESH, node(contact=GONE), 100)
    later, todo = step(made, node(contact=GONE), 1e7)
    assert later.status == made.status
    assert waiting(later.status) == ("Contact", "node n1")
    assert (later.status.contact, todo.requeue_after) == (GONE, None)
    back, _ = step(later, node(since=1e7), 1e7)
    assert back.status.contact is Contact.REACHABLE


@pytest.mark.parametrize("on", [None, node(membership=Membership.REJECTED)])
def test_outputs_on_a_node_that_is_gone_wait_for_the_operator(on: Node | None) -> None:
    made, _ = step(FRESH, on, 5)
    assert made.status.contact is Contact.LOST
    assert waiting(made.status) == ("Node", "operator")
    later, _ = step(made, on, 500)
    assert later.status == made.status
    late, _ = step(made, on, 600, publication_report(PublicationPhase.DELIVERED))
    assert late.status.phase is PublicationPhase.DELIVERED
    assert late.status.contact is Contact.REACHABLE


def test_a_wiped_node_has_lost_the_outputs() -> None:
    made, _ = step(FRESH, node(), 0, publication_report(PublicationPhase.PUBLISHING))
    wiped = node(incarnation="ledger-2", since=10)
    made, _ = step(made, wiped, 20)
    assert waiting(made.status) == ("Recovery", "node n1")
    made, _ = step(made, wiped, 70)
    assert made.status.contact is Contact.LOST


def test_a_node_that_does_not_acknowledge() -> None:
    made, _ = step(FRESH, node(), 0)
    made, _ = step(made, node(), 61)
    assert made.status.contact is GONE
    assert waiting(made.status) == ("NodeAck", "node n1")


@pytest.mark.parametrize(("has_job", "has_execution"), [(False, True), (True, False)])
def test_what_has_lost_its_owner_is_stopped(has_job: bool, has_execution: bool) -> None:
    made, todo = step(FRESH, node(), 0, has_job=has_job, has_execution=has_execution)
    assert (todo.stop, todo.delete) == (True, False)
    assert waiting(made.status) == ("Stop", "node n1")
    stopped = publication_report(PublicationPhase.FAILED).but(reason="Stopped")
    _, todo = step(made, node(), 1, stopped, has_job=has_job, has_execution=has_execution)
    assert todo.delete is not has_job  # the record of a live job stays


def test_without_a_job_it_goes_at_once_where_nobody_can_be_told() -> None:
    _, todo = step(FRESH, node(contact=GONE), 0, has_job=False)
    assert (todo.stop, todo.delete) == (False, True)


def test_the_outcome_of_a_delivery_outlives_its_execution() -> None:
    made, _ = step(FRESH, node(), 0, publication_report(PublicationPhase.DELIVERED))
    _, todo = step(made, node(), 1, has_execution=False)
    assert (todo.stop, todo.delete) == (False, False)
    _, todo = step(made, node(), 1, has_job=False)
    assert todo.delete


REPORTS = st.builds(
    publication_report,
    st.sampled_from(PublicationPhase),
    st.integers(0, 5),
    incarnation=st.sampled_from(["ledger-1", "ledger-2"]),
)


@given(st.lists(REPORTS, min_size=1, max_size=6))
def test_reports_merge_to_the_same_whatever_is_repeated(reports: list[PublicationReport]) -> None:
    merged: PublicationReport | None = None
    for each in reports:
        before, merged = merged, merge_publication_report(merged, each)
        if before is not None and before.phase.is_final:
            assert merged == before
    for each in reports:  # sent again
        assert merge_publication_report(merged, each) == merged


@given(
    st.lists(REPORTS, min_size=1, max_size=5, unique_by=lambda r: (r.phase, r.step)), st.randoms()
)
def test_reports_merge_in_any_order(reports: list[PublicationReport], rng: Any) -> None:
    """For the reports of one node: at most one of them is final."""
    finals = [r for r in reports if r.phase.is_final]
    reports = [r for r in reports if not r.phase.is_final] + finals[:1]
    shuffled = list(reports)
    rng.shuffle(shuffled)
    results = []
    for order in (reports, shuffled):
        merged: PublicationReport | None = None
        for each in order:
            merged = merge_publication_report(merged, each)
        results.append(merged)
    assert results[0] == results[1]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(-100, 300),
            st.lists(REPORTS, max_size=2),
            st.one_of(
                st.none(),
                st.builds(
                    node,
                    contact=st.sampled_from([Contact.REACHABLE, Contact.UNKNOWN]),
                    membership=st.sampled_from(Membership),
                    incarnation=st.sampled_from(["ledger-1", "ledger-2"]),
                ),
            ),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_properties_of_every_history(steps: list[tuple[Any, ...]]) -> None:
    made, now = FRESH, 0.0
    for passed, reports, on, has_job, has_execution in steps:
        now += passed
        owners = {"has_job": has_job, "has_execution": has_execution}
        made, todo = step(made, on, now, *reports, **owners)
        assert (made.status.waiting is None) == made.status.phase.is_final
        again, more = step(made, on, now, *reports, **owners)
        assert again == made
        assert more.delete == todo.delete
        assert todo.requeue_after is None or todo.requeue_after > 0
        if todo.delete:
            return
