"""Explanations that need more than one object: why it landed there, why it waits for its namespace,
whether one job fits one node."""

import httpx
import pytest

from bacalhau.client.sync import Client
from bacalhau_api.errors import InvalidError, NotFoundError
from bacalhau_api.meta import Waiting
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase, RuleCount, Verdict
from bacalhau_api.v1.node import Taint
from tests.support.api_objects import T0, make_execution, stored_job
from tests.support.api_server import RunningServer
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
