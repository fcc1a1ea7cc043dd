"""Logs of executions and jobs, live and afterwards."""

import asyncio
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bacalhau.client.aio import AsyncClient
from bacalhau.client.logposition import BACK, LOST
from bacalhau.client.sync import Client
from bacalhau.server import logs
from bacalhau_api.errors import NotFoundError, UnavailableError
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase
from bacalhau_api.wire import LogChunk
from tests.support.api_objects import make_execution, make_node, stored_job
from tests.support.api_server import RunningServer, running_server


def arranged(
    server: RunningServer, *, count: int = 1, phase: Phase = Phase.RUNNING
) -> tuple[Job, list[Execution]]:
    """A job whose executions are in that phase."""
    job_phase = JobPhase.COMPLETED if phase is Phase.SUCCEEDED else JobPhase.RUNNING
    job = stored_job(count=count, phase=job_phase)
    executions = [make_execution(job, i, phase=phase) for i in range(count)]
    server.put(job, *executions, make_node())
    return job, executions


def test_log_of_what_has_ended(client: Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server, phase=Phase.SUCCEEDED)
    server.nodes.write("n1", execution.name, "stdout", "one\ntwo\n")
    server.nodes.write("n1", execution.name, "stderr", "oops\n")
    server.nodes.finish("n1", execution.name)
    records = list(client.logs(execution))
    assert [(r.stream, r.text) for r in records] == [("stdout", "one\ntwo\n"), ("stderr", "oops\n")]
    assert records[0].offset is None
    assert records[-1].offset == 13
    assert [r.text for r in client.logs(execution, stream="stderr")] == ["oops\n"]
    assert [r.text for r in client.logs(execution, tail=1, stream="stdout")] == ["two\n"]


def test_log_goes_on_from_an_offset(client: Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server)
    server.nodes.write("n1", execution.name, "stdout", "one\n")
    (first,) = client.logs(execution)
    server.nodes.write("n1", execution.name, "stdout", "two\n")
    assert first.offset is not None
    assert [r.text for r in client.logs(execution, offset=first.offset)] == ["two\n"]


def test_follow_ends_with_the_execution(client: Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server)
    server.nodes.write("n1", execution.name, "stdout", "one\n")
    texts = []
    for record in client.logs(execution, follow=True):
        texts.append(record.text)
        if len(texts) == 1:
            server.nodes.write("n1", execution.name, "stdout", "two\n")
        else:
            server.nodes.finish("n1", execution.name)
    assert texts == ["one\n", "two\n"]


def test_follow_a_job_joins_in_new_executions(client: Client, server: RunningServer) -> None:
    job, (first,) = arranged(server)
    second = make_execution(job, 1, phase=Phase.RUNNING)
    server.nodes.write("n1", first.name, "stdout", "first\n")
    seen = []
    for record in client.logs(job, follow=True):
        if not record.text:
            continue
        seen.append((record.slot, record.text))
        if len(seen) == 1:
            server.nodes.finish("n1", first.name)
            server.nodes.write("n1", second.name, "stdout", "second\n")
            server.put(second)
        else:
            server.nodes.finish("n1", second.name)
            server.put(stored_job(phase=JobPhase.COMPLETED))
    assert seen == [("0", "first\n"), ("1", "second\n")]


@pytest.mark.parametrize("follow", [False, True])
def test_attempts_of_a_slot_come_one_after_the_other(
    client: Client, server: RunningServer, follow: bool
) -> None:
    """The first one's log is long and comes late; the second one's is there at once."""
    job = stored_job(phase=JobPhase.FAILED)
    first = make_execution(job, phase=Phase.FAILED)
    second = make_execution(job, attempt=1, phase=Phase.FAILED)
    server.nodes.slow[first.name] = 0.2
    for execution, text in ((first, "one\n"), (second, "two\n")):
        server.nodes.write("n1", execution.name, "stdout", text)
        server.nodes.finish("n1", execution.name)
    server.put(job, first, second)
    records = list(client.logs(job, follow=follow))
    assert [(r.attempt, r.text) for r in records] == [(0, "one\n"), (1, "two\n")]


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.RUNNING], ids=["ended", "running"])
def test_an_attempt_on_a_node_that_is_away_does_not_hide_the_next(
    client: Client, server: RunningServer, phase: Phase
) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    first = make_execution(job, node="gone", phase=phase)
    second = make_execution(job, attempt=1, phase=Phase.RUNNING)
    server.nodes.away.add("gone")
    server.nodes.write("n1", second.name, "stdout", "two\n")
    server.put(job, first, second, make_node())
    told = (r.text for r in client.logs(job, follow=True) if r.text)
    assert next(told) == "two\n"


def test_follow_waits_for_an_execution_that_has_not_begun(
    client: Client, server: RunningServer
) -> None:
    job, (execution,) = arranged(server, phase=Phase.PREPARING)
    begin = threading.Timer(0.3, begin_now, (server, job, execution))
    begin.start()
    assert [r.text for r in client.logs(execution, follow=True)] == ["hi\n"]
    begin.join()


def begin_now(server: RunningServer, job: Job, execution: Execution) -> None:
    """The workload starts, writes, and ends."""
    server.nodes.write("n1", execution.name, "stdout", "hi\n")
    server.nodes.finish("n1", execution.name)
    server.put(make_execution(job, 0, phase=Phase.RUNNING))


def test_many_partitions_come_complete(client: Client, server: RunningServer) -> None:
    job, executions = arranged(server, count=20, phase=Phase.SUCCEEDED)
    for i, execution in enumerate(executions):
        server.nodes.write("n1", execution.name, "stdout", f"line {i}\n" * 50)
        server.nodes.finish("n1", execution.name)
    texts: dict[str, str] = {}
    for record in client.logs(job):
        texts[record.slot] = texts.get(record.slot, "") + record.text
    assert texts == {str(i): f"line {i}\n" * 50 for i in range(20)}


def test_node_away_shows_what_was_reported(client: Client, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.COMPLETED)
    told = make_execution(job, 0, phase=Phase.SUCCEEDED, stdout_tail="the end\n")
    silent = make_execution(job, 1, phase=Phase.SUCCEEDED)
    server.put(job, told, silent)
    server.nodes.away.add("n1")
    notice, record = client.logs(told)
    assert "away" in notice.notice
    assert record.text == "the end\n"
    with pytest.raises(UnavailableError, match="which is away"):
        list(client.logs(silent))
    # Of a job, what can be read is; what cannot is said.
    texts = [r.text or r.notice for r in client.logs(job)]
    assert "the end\n" in texts
    assert any("which is away" in text for text in texts)


def test_follow_goes_on_when_the_node_is_back(client: Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server)
    server.nodes.write("n1", execution.name, "stdout", "one\n")
    server.nodes.finish("n1", execution.name)
    server.nodes.away.add("n1")
    told = []
    for record in client.logs(execution, follow=True):
        told.append(record.notice or record.text)
        server.nodes.away.clear()
    assert told == [
        "node n1 is away; its log goes on when it is back",
        "node n1 is back",
        "one\n",
    ]


def test_a_reader_that_leaves_stops_the_reading(server: RunningServer, client: Client) -> None:
    _, (execution,) = arranged(server)
    server.nodes.write("n1", execution.name, "stdout", "one\n")
    stream = client.logs(execution, follow=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    server.stop()  # would take long if the follower were still there


@pytest.mark.parametrize("of_job", [False, True], ids=["execution", "job"])
def test_a_quiet_log_is_answered_at_once_and_says_that_it_is_still_there(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch, of_job: bool
) -> None:
    job, (execution,) = arranged(server)
    server.nodes.directory("n1", "default", execution.name).joinpath("outputs").mkdir(parents=True)
    what = f"jobs/{job.name}" if of_job else f"executions/{execution.name}"
    path = f"/apis/bacalhau.org/v1/namespaces/default/{what}/logs?follow=true"
    with http.stream("GET", path, timeout=5) as answer:  # a read waits for 10 s
        assert answer.status_code == 200
        assert next(answer.iter_raw()) == b"\n"
    monkeypatch.setattr(logs, "WAIT_SECONDS", 0.2)
    with http.stream("GET", path, timeout=5) as answer:
        assert [line for line, _ in zip(answer.iter_raw(), range(3), strict=False)] == [b"\n"] * 3


def test_readers_of_a_quiet_log_that_leave_hold_nothing_up(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (execution,) = arranged(server)
    server.nodes.directory("n1", "default", execution.name).joinpath("outputs").mkdir(parents=True)
    path = f"/apis/bacalhau.org/v1/namespaces/default/executions/{execution.name}/logs?follow=true"
    read_log, reading = server.nodes.read_log, 0

    async def counted(*asked: Any) -> LogChunk:
        nonlocal reading
        reading += 1
        try:
            return await read_log(*asked)
        finally:
            reading -= 1

    monkeypatch.setattr(server.nodes, "read_log", counted)
    for _ in range(3):
        with suppress(httpx.ReadTimeout):
            httpx.get(f"{server.url}{path}", timeout=0.5, trust_env=False)
    deadline = time.monotonic() + 5
    while reading:
        assert time.monotonic() < deadline, "a client that left is read for"
        time.sleep(0.02)


def test_log_of_nothing(client: Client, http: httpx.Client, server: RunningServer) -> None:
    job = stored_job()
    with pytest.raises(NotFoundError):
        list(client.logs(job))
    server.put(job)
    assert list(client.logs(job)) == []


def test_log_forms(http: httpx.Client, server: RunningServer) -> None:
    _, (execution,) = arranged(server, phase=Phase.SUCCEEDED)
    server.nodes.write("n1", execution.name, "stdout", "<script>alert(1)</script>\n")
    server.nodes.finish("n1", execution.name)
    path = f"/apis/bacalhau.org/v1/namespaces/default/executions/{execution.name}/logs"
    text = http.get(path, headers={"accept": "text/plain"})
    assert text.text == "<script>alert(1)</script>\n"
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    assert text.headers["x-content-type-options"] == "nosniff"
    sse = http.get(path, headers={"accept": "text/event-stream"}).text
    assert sse.startswith("event: log\ndata: {")
    assert sse.rstrip().endswith('event: end\ndata: {"end":true}')
    for query in (
        "tail=-1",
        "tail=x",
        "stream=stdin",
        "offset=-1",
        "offset=9999999999999999999999",
    ):
        assert http.get(f"{path}?{query}").status_code == 400, query


def read_through_a_restart(root: Path, *, of_job: bool, tail: int | None) -> tuple[str, list[str]]:
    """Follow a log while its server ends and another begins at the same address, on the same
    nodes. The text of slot 0, and the notices."""
    text, notices = "", list[str]()
    with running_server(root) as first, Client(first.url) as client:
        port = int(first.url.rpartition(":")[2])
        job, executions = arranged(first, count=2)
        for number, execution in enumerate(executions):
            first.nodes.write("n1", execution.name, "stdout", f"old {number}\none {number}\n")
        of = job if of_job else executions[0]
        with ExitStack() as stack:
            for record in client.logs(of, follow=True, tail=tail):
                notices += [record.notice] if record.notice else []
                text += record.text if record.slot == "0" else ""
                is_first = bool(record.text) and first.is_running
                if is_first and (not of_job or record.slot == "0"):
                    first.stop()
                    first.nodes.write("n1", executions[0].name, "stdout", "two 0\n")
                    second = stack.enter_context(running_server(root, port=port))
                    arranged(second, count=2)
                elif record.text.startswith("two"):
                    for execution in executions:
                        second.nodes.finish("n1", execution.name)
                    second.put(stored_job(count=2, phase=JobPhase.COMPLETED))
    return text, notices


@pytest.mark.parametrize("of_job", [False, True], ids=["execution", "job"])
@pytest.mark.parametrize(("tail", "start"), [(None, "old 0\none 0\n"), (1, "one 0\n")])
def test_follow_survives_a_restart_of_the_server(
    tmp_path: Path, of_job: bool, tail: int | None, start: str
) -> None:
    text, notices = read_through_a_restart(tmp_path / "nodes", of_job=of_job, tail=tail)
    assert text == f"{start}two 0\n"
    assert notices == [LOST, BACK]


async def test_the_asynchronous_client_survives_it_too(tmp_path: Path) -> None:
    root = tmp_path / "nodes"
    texts = []
    with running_server(root) as first, ExitStack() as stack:
        port = int(first.url.rpartition(":")[2])
        job, (execution,) = arranged(first)
        first.nodes.write("n1", execution.name, "stdout", "one\n")
        async with AsyncClient(first.url) as client:
            async for record in client.logs(job, follow=True):
                texts += [record.text] if record.text else []
                if record.text == "one\n":
                    await asyncio.to_thread(first.stop)
                    first.nodes.write("n1", execution.name, "stdout", "two\n")
                    second = stack.enter_context(running_server(root, port=port))
                    await asyncio.to_thread(arranged, second)
                elif record.text:
                    second.nodes.finish("n1", execution.name)
                    await asyncio.to_thread(second.put, stored_job(phase=JobPhase.COMPLETED))
    assert texts == ["one\n", "two\n"]


def test_a_log_that_is_not_followed_does_not_try_again(
    client: Client, server: RunningServer
) -> None:
    _, (execution,) = arranged(server, phase=Phase.SUCCEEDED)
    server.stop()
    with pytest.raises(UnavailableError, match="no server answers"):
        list(client.logs(execution))
    with pytest.raises(UnavailableError, match="no server answers"):
        list(client.logs(execution, follow=True))
