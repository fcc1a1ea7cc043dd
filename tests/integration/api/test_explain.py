"""Explanations that need more than one object: why it landed there, why it waits for its namespace,
whether one job fits one node."""

import httpx
import pytest

from bacalhau.client.sync import Client
from bacalhau_api.errors import InvalidError, NotFoundError
from bacalhau_api.meta import Condition, Contact, Waiting
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase, RuleCount, Verdict
from bacalhau_api.v1.node import Taint
from tests.support.api_objects import T0, make_acceptance, make_execution, stored_job
from tests.support.api_server import RunningServer, Shell
from tests.support.job_world import make_node

EXPLAIN = "/apis/bacalhau.org/v1/namespaces/default/jobs/a/explain"


def test_an_execution_tells_why_it_is_where_it_is(client: Client, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    execution = make_execution(job, phase=Phase.RUNNING)
    verdict = Verdict(
        slot="0",
        time=T0,
        node="n1",
        nodes_total=5,
        rejected=(RuleCount(rule="Contact", nodes=2, example="n3 is not heard from"),),
        scores={"capacity": 0.9},
    )
    other = verdict.but(slot="1", node="n2")
    server.put(job.but(status=job.status.but(verdicts=(other, verdict))), execution)
    told = client.explain(Execution, execution.name)
    assert told.verdicts == (verdict,)
    assert "slot 0 was placed on n1 (capacity 0.90)" in told.because
    assert "3 of 5 nodes fitted, and it was the best of them" in told.because
    assert "Contact turned down 2, such as: n3 is not heard from" in told.because


def away(execution: Execution, contact: Contact, reason: str, message: str) -> Execution:
    """The execution as its reconciler leaves it when its node is out of contact."""
    condition = Condition(
        type="Contact", status=False, reason=reason, message=message, last_transition_time=T0
    )
    status = execution.status.but(contact=contact, conditions=(condition,))
    return execution.but(status=status)


def told_to_wait(execution: Execution) -> Execution:
    """The execution, whose node said that it waits for its workload."""
    report = execution.status.report
    assert report is not None
    waiting = Waiting(what="Workload", message="", since=T0, mover="workload")
    return execution.but(status=execution.status.but(report=report.but(waiting=waiting)))


def test_a_lost_execution_waits_for_nothing_that_its_node_said_before(
    client: Client, server: RunningServer, shell: Shell
) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    execution = told_to_wait(make_execution(job, phase=Phase.RUNNING))
    message = "node n1 is not heard from for longer than its job allows"
    server.put(job, away(execution, Contact.LOST, "NodeSilent", message))
    told = client.explain(Execution, execution.name)
    assert told.waiting is None
    assert told.headline.endswith("Running/Lost: node n1 is lost; a late report still counts")
    assert "Workload" not in shell("get", "executions", "-o", "wide")[1]


@pytest.mark.parametrize(
    ("reason", "word"), [("NodeRejected", "rejected"), ("NodeRemoved", "removed")]
)
def test_a_job_tells_who_took_its_node_away(
    client: Client, server: RunningServer, reason: str, word: str
) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    execution = make_execution(job, phase=Phase.RUNNING)
    gone = away(execution, Contact.LOST, reason, f"node n1 was {word}")
    server.put(job, gone)
    told = client.explain(Job, "a")
    assert f"node n1 was {word}, 1 of its executions is lost" in told.because
    assert not any("policy" in text or "not heard" in text for text in told.because)
    server.put(away(execution, Contact.UNKNOWN, reason, f"node n1 was {word}"))
    because = client.explain(Job, "a").because
    assert any("the job's disconnect policy is" in text for text in because), "stop still decides"


def test_of_a_slot_the_attempt_that_was_kept_is_told(client: Client, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    kept = make_execution(job, phase=Phase.RUNNING)
    other = make_execution(job, attempt=1, node="n2", phase=Phase.STOPPED)
    other = other.but(spec=other.spec.but(superseded=True))
    server.put(job, kept, other)
    (slot,) = client.explain(Job, "a").slots
    assert (slot.execution, slot.node, slot.attempts) == (kept.name, "n1", 2)
    because = client.explain(Execution, other.name).because
    assert "another attempt was kept for its slot" in because
    server.put(make_acceptance(kept, job))
    because = client.explain(Execution, other.name).because
    assert "another attempt's result was accepted for its slot" in because


def test_a_job_over_quota_is_told_what_would_help(client: Client, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.QUEUED)
    waiting = Waiting(what="Quota", message="namespace default uses it all", since=T0, mover="x")
    server.put(job.but(status=job.status.but(waiting=waiting)))
    told = client.explain(Job, "a")
    assert told.headline == "it is queued: namespace default uses it all"
    assert any("raise the quota of namespace default" in text for text in told.remedies)


def test_one_pair_is_told_rule_by_rule(client: Client, server: RunningServer) -> None:
    server.put(
        stored_job(),
        make_node("good"),
        make_node("bad", cpu=100, unschedulable=True, taints=(Taint(key="gpu"),)),
    )
    fits = client.explain_pair("good", "a")
    assert fits.remedies == ()
    assert all(rule.ok for rule in fits.rules)
    assert {rule.rule for rule in fits.rules} >= {"Membership", "Contact", "Engine", "Cpu"}
    misses = client.explain_pair("bad", "a")
    assert [rule.rule for rule in misses.rules if not rule.ok] == ["Schedulable", "Taints", "Cpu"]
    assert "bacalhau node uncordon bad" in " ".join(misses.remedies)
    with pytest.raises(NotFoundError):
        client.explain_pair("good", "nobody")
    with pytest.raises(NotFoundError):
        client.explain_pair("nowhere", "a")


def test_a_pair_needs_a_job_and_a_node(
    http: httpx.Client, client: Client, server: RunningServer
) -> None:
    server.put(stored_job(), make_node("n1"))
    for asked in ({"job": "a"}, {"job": "a", "node": "n1"}):
        answer = http.get(EXPLAIN, params=asked)
        assert answer.status_code == 400
        assert answer.json()["field"] == "job"
    assert http.get(EXPLAIN, params={"node": "n1"}).status_code == 200


def test_what_no_server_takes_is_refused_before_it_is_sent(client: Client) -> None:
    with pytest.raises(InvalidError, match="without"):
        client.simulate([])
    with pytest.raises(InvalidError, match="message"):
        client.rollback(Job, "a", 1, message="x" * 2000)
