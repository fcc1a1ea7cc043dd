"""What a node's status should be."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bacalhau_api.meta import Condition, Contact
from bacalhau_api.v1.node import Capability, Membership, Node, NodeInfo, NodeStatus
from bacalhau_controllers.node.plan import View, plan
from bacalhau_controllers.node.presence import Sighting, Silence
from tests.support.samples import LEDGER, at, node

INFO = NodeInfo(version="1", engines=(Capability(name="wasm"),))
HERE = Sighting(LEDGER, "s", INFO)
SILENT = Sighting(LEDGER, "s", INFO, is_silent=True)
GONE = Sighting(LEDGER, "s", INFO, is_gone=True)


def view(
    sighting: Sighting | None,
    *,
    seconds: float = 0,
    grace: float = 0,
    executions: int = 0,
) -> View:
    silence = Silence(seconds, is_whole=sighting is not None, grace_left_seconds=grace)
    return View(sighting, silence, executions)


def planned(given: Node, what: View, now: float = 100) -> NodeStatus:
    return plan(given, what, at(now)).status


def condition(status: NodeStatus, type: str) -> Condition:
    return next(c for c in status.conditions if c.type == type)


@pytest.mark.parametrize(
    ("before", "seen", "grace", "contact"),
    [
        (Contact.UNKNOWN, HERE, 0, Contact.REACHABLE),
        (Contact.REACHABLE, HERE, 0, Contact.REACHABLE),
        (Contact.REACHABLE, SILENT, 0, Contact.UNKNOWN),
        (Contact.REACHABLE, GONE, 30, Contact.UNKNOWN),
        (Contact.REACHABLE, None, 10, Contact.REACHABLE),  # the leader has just begun
        (Contact.REACHABLE, None, 0, Contact.UNKNOWN),
        (Contact.UNKNOWN, None, 10, Contact.UNKNOWN),
    ],
)
def test_contact(before: Contact, seen: Sighting | None, grace: float, contact: Contact) -> None:
    todo = plan(node(contact=before), view(seen, grace=grace), at(100))
    assert todo.status.contact is contact
    is_on_grace = seen is None and before is contact is Contact.REACHABLE
    assert todo.requeue_after == (10 if is_on_grace else None)


def test_times_of_contact() -> None:
    here = planned(node(contact=Contact.UNKNOWN, since=5), view(HERE), 100)
    assert (here.contact_since, here.connected_since) == (at(100), at(100))
    still = planned(node().but(status=here), view(HERE), 200)
    assert still == here  # a heartbeat changes nothing
    silent = planned(node().but(status=still), view(SILENT, seconds=15), 300)
    assert (silent.contact_since, silent.connected_since) == (at(285), None)
    assert silent.waiting
    assert (silent.waiting.what, silent.waiting.mover) == ("Contact", "node n1")
    assert silent.waiting.since == at(285)


def test_a_new_ledger_begins_a_new_stretch_of_contact() -> None:
    wiped = Sighting("ledger-2", "s2", INFO)
    status = planned(node(since=0), view(wiped), 100)
    assert (status.incarnation, status.connected_since) == ("ledger-2", at(100))
    assert status.contact_since == at(0)


def test_a_reconnect_within_the_grace_of_a_new_leader_writes_nothing() -> None:
    before = planned(node(), view(HERE), 0)
    after = planned(node().but(status=before), view(Sighting(LEDGER, "s9", INFO)), 500)
    assert after == before


def test_news_is_taken_over() -> None:
    news = NodeInfo(version="2", labels={"zone": "a"})
    status = planned(node(), view(Sighting(LEDGER, "s", news)))
    assert status.info == news


@pytest.mark.parametrize(
    ("given", "seen", "what", "mover"),
    [
        (node(membership=Membership.PENDING), HERE, "Approval", "operator"),
        (node(membership=Membership.REJECTED), SILENT, None, None),
        (node(), HERE, None, None),
        (node(), SILENT, "Contact", "node n1"),
        (node(contact=Contact.UNKNOWN, incarnation=""), None, "FirstContact", "node n1"),
    ],
)
def test_waiting(given: Node, seen: Sighting | None, what: str | None, mover: str | None) -> None:
    waiting = planned(given, view(seen)).waiting
    assert (waiting and waiting.what, waiting and waiting.mover) == (what, mover)


def test_drain() -> None:
    draining = node(drain=True)
    some = planned(draining, view(HERE, executions=2))
    assert some.waiting
    assert some.waiting.what == "Drain"
    assert (condition(some, "Drained").status, condition(some, "Drained").reason) == (
        False,
        "Draining",
    )
    none = planned(draining.but(status=some), view(HERE), 200)
    assert none.waiting is None
    assert condition(none, "Drained").status
    assert condition(none, "Drained").last_transition_time == at(200)
    over = planned(node().but(status=none), view(HERE), 300)
    assert all(c.type != "Drained" for c in over.conditions)


@pytest.mark.parametrize(
    ("given", "seen", "is_ready", "reason"),
    [
        (node(), HERE, True, "Ready"),
        (node(), SILENT, False, "NoContact"),
        (node(membership=Membership.PENDING), HERE, False, "MembershipPending"),
        (node(membership=Membership.REJECTED), HERE, False, "MembershipRejected"),
    ],
)
def test_ready(given: Node, seen: Sighting, is_ready: bool, reason: str) -> None:
    ready = condition(planned(given, view(seen)), "Ready")
    assert (ready.status, ready.reason) == (is_ready, reason)


def test_engine_faults_are_passed_on_and_pass() -> None:
    broken = NodeInfo(
        engines=(
            Capability(name="docker", available=False, reason="starts hang"),
            Capability(name="wasm"),
        )
    )
    bad = planned(node(), view(Sighting(LEDGER, "s", broken)))
    fault = condition(bad, "EngineFault")
    assert (fault.status, fault.message) == (True, "docker: starts hang")
    assert condition(bad, "Ready").status  # wasm still works
    good = planned(node().but(status=bad), view(HERE), 200)
    assert not condition(good, "EngineFault").status
    none = NodeInfo(engines=(Capability(name="docker", available=False),))
    dead = planned(node(), view(Sighting(LEDGER, "s", none)))
    assert condition(dead, "Ready").reason == "NoEngine"


SIGHTINGS = st.one_of(
    st.none(),
    st.builds(
        Sighting,
        st.sampled_from(["ledger-1", "ledger-2"]),
        st.sampled_from(["s1", "s2"]),
        st.just(INFO),
        is_silent=st.booleans(),
        is_gone=st.booleans(),
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(-100, 100),
            SIGHTINGS,
            st.sampled_from([0.0, 10.0]),
            st.integers(0, 2),
            st.sampled_from(Membership),
            st.booleans(),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_planning_again_changes_nothing(steps: list[tuple[Any, ...]]) -> None:
    given, now = node(contact=Contact.UNKNOWN, incarnation=""), 0.0
    for passed, seen, grace, executions, membership, drain in steps:
        now += passed
        given = given.but(spec=given.spec.but(membership=membership, drain=drain))
        what = view(seen, seconds=3, grace=grace, executions=executions)
        given = given.but(status=planned(given, what, now))
        assert planned(given, what, now) == given.status
        assert planned(given, what, now + 5) == given.status  # nor does time alone
        is_connected = seen is not None and seen.is_connected
        assert (given.status.connected_since is not None) == (
            given.status.contact is Contact.REACHABLE
        )
        if is_connected:
            assert given.status.contact is Contact.REACHABLE
        if given.status.contact is not Contact.REACHABLE and membership is Membership.APPROVED:
            assert given.status.waiting
