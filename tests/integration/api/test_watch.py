"""Watches: order, resuming, slow clients, and clients that reconnect."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bacalhau.client import AsyncClient
from bacalhau.client.errors import WaitTimeoutError
from bacalhau.client.sync import Client
from bacalhau_api.errors import NotFoundError
from bacalhau_api.meta import Ref
from bacalhau_api.v1.execution import Execution, Phase
from bacalhau_api.v1.job import Job, JobPhase
from tests.support.api_objects import make_execution, stored_job
from tests.support.api_server import RunningServer, running_server

JOBS = "/apis/bacalhau.org/v1/namespaces/default/jobs"


def events(http: httpx.Client, **params: str) -> Iterator[tuple[str, str, Any]]:
    """(cursor, type, object) of a watch, until the server ends it."""
    with http.stream("GET", JOBS, params={"watch": "true", **params}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        cursor = kind = ""
        for line in answer.iter_lines():
            if line.startswith("id: "):
                cursor = line[4:]
            elif line.startswith("event: "):
                kind = line[7:]
            elif line.startswith("data: "):
                yield cursor, kind, json.loads(line[6:])["object"]
                cursor = ""


def test_watch_tells_what_exists_then_what_changes(
    http: httpx.Client, server: RunningServer
) -> None:
    server.put(stored_job("a"))
    stream = events(http)
    cursor, kind, item = next(stream)
    assert (cursor, kind, item["metadata"]["name"]) == ("", "ADDED", "a")
    cursor, kind, item = next(stream)
    assert (kind, item) == ("SYNCED", None)
    assert cursor
    server.put(stored_job("a", phase=JobPhase.RUNNING))
    _, kind, item = next(stream)
    assert (kind, item["status"]["phase"]) == ("MODIFIED", "Running")
    server.drop(Ref("Job", "default", "a"))
    _, kind, item = next(stream)
    assert (kind, item["metadata"]["name"]) == ("DELETED", "a")
    stream.close()  # type: ignore[attr-defined]


def test_resuming_tells_changes_and_removals_but_not_the_rest(
    http: httpx.Client, server: RunningServer
) -> None:
    server.put(stored_job("a"), stored_job("b"), stored_job("c"))
    cursor = http.get(JOBS).json()["metadata"]["resourceVersion"]
    server.put(stored_job("b", phase=JobPhase.RUNNING), stored_job("d"))
    server.drop(Ref("Job", "default", "c"))
    # Gone and back: told as both, the newer one last.
    server.drop(Ref("Job", "default", "a"))
    server.put(stored_job("a"))
    told = []
    for _, kind, item in events(http, resourceVersion=cursor, timeoutSeconds="5"):
        if kind == "SYNCED":
            break
        told.append((kind, item["metadata"]["name"]))
    assert [name for kind, name in told if kind == "ADDED"] == ["b", "d", "a"]
    assert {name for kind, name in told if kind == "DELETED"} == {"c", "a"}
    assert told.index(("DELETED", "a")) < told.index(("ADDED", "a"))


def test_resuming_from_another_store_begins_anew(http: httpx.Client, server: RunningServer) -> None:
    server.put(stored_job("a"))
    kinds = [k for _, k, _ in events(http, resourceVersion="3.other", timeoutSeconds="0.3")]
    assert kinds == ["RESET", "ADDED", "SYNCED"]


def test_what_leaves_the_selection_is_deleted_for_the_watcher(
    http: httpx.Client, server: RunningServer
) -> None:
    server.put(stored_job("a"))
    stream = events(http, fieldSelector="phase=Pending")
    assert [next(stream)[1], next(stream)[1]] == ["ADDED", "SYNCED"]
    server.put(stored_job("b", phase=JobPhase.RUNNING))
    server.put(stored_job("a", phase=JobPhase.RUNNING))
    _, kind, item = next(stream)
    assert (kind, item["metadata"]["name"]) == ("DELETED", "a")
    stream.close()  # type: ignore[attr-defined]


def test_last_event_id_resumes_like_a_browser_would(
    http: httpx.Client, server: RunningServer
) -> None:
    server.put(stored_job("a"))
    cursor = http.get(JOBS).json()["metadata"]["resourceVersion"]
    server.put(stored_job("b"))
    params = {"watch": "true", "timeoutSeconds": "0.3"}
    with http.stream("GET", JOBS, params=params, headers={"Last-Event-ID": cursor}) as answer:
        text = answer.read().decode()
    assert '"name":"b"' in text
    assert '"name":"a"' not in text


def test_a_slow_client_is_cut_and_told_how_to_resume(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.app.context.hub, "_buffer_max", 20)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(f"GET {JOBS}?watch=true HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        raw.settimeout(20)
        while b"SYNCED" not in (head := raw.recv(65536)):
            assert head
        padded = stored_job("big").with_meta(annotations={"pad": "x" * 60_000})
        for number in range(120):  # several MB: more than all buffers on the way hold
            server.put(padded.with_meta(labels={"n": str(number)}))
        data = b""
        while piece := raw.recv(1 << 20):
            data += piece
            if b"SlowClient" in data and data.rstrip().endswith(b"0"):
                break
    error = data[data.index(b"event: ERROR") :]
    body = json.loads(error.split(b"data: ")[1].split(b"\n")[0])["object"]
    assert body["reason"] == "SlowClient"
    cursor = body["hint"].split("resourceVersion=")[1]
    with httpx.Client(base_url=server.url, trust_env=False) as http:
        names = [
            item["metadata"]["labels"]["n"]
            for _, kind, item in events(http, resourceVersion=cursor, timeoutSeconds="0.5")
            if kind == "ADDED"
        ]
    assert names == ["119"]
    assert len(server.app.context.hub) == 0


def test_watchers_that_leave_are_forgotten(http: httpx.Client, server: RunningServer) -> None:
    stream = events(http)
    next(stream)
    assert len(server.app.context.hub) == 1
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while len(server.app.context.hub) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(server.app.context.hub) == 0


def test_too_many_watchers(
    http: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.app.context.hub, "_watchers_max", 1)
    stream = events(http)
    next(stream)
    answer = http.get(JOBS, params={"watch": "true"})
    assert answer.status_code == 429
    assert answer.json()["reason"] == "TooManyWatchers"
    stream.close()  # type: ignore[attr-defined]


def test_wait_returns_when_the_job_is_over(client: Client, server: RunningServer) -> None:
    server.put(stored_job("a"))
    seen: list[str] = []

    def on_update(job: Job) -> None:
        seen.append(str(job.status.phase))
        if job.status.phase is JobPhase.PENDING:
            server.put(stored_job("a", phase=JobPhase.RUNNING))
        elif job.status.phase is JobPhase.RUNNING:
            server.put(stored_job("a", phase=JobPhase.COMPLETED))

    waited = client.wait("a", on_update=on_update, timeout_seconds=20)
    assert waited.is_reached
    assert seen == ["Pending", "Running", "Completed"]
    server.put(stored_job("f", phase=JobPhase.FAILED))
    assert not client.wait("f", timeout_seconds=20).is_reached


def test_wait_does_not_take_an_older_generation_for_this_one(
    client: Client, server: RunningServer
) -> None:
    server.put(stored_job("a", phase=JobPhase.COMPLETED))
    again = client.rerun("a")
    with pytest.raises(WaitTimeoutError):
        client.wait("a", generation=again.metadata.generation, timeout_seconds=0.2)


def test_wait_does_not_take_the_end_of_before_for_that_of_a_rerun_of_what_failed(
    client: Client, server: RunningServer
) -> None:
    server.put(stored_job("a", phase=JobPhase.FAILED))
    again = client.rerun("a", failed=True)
    with pytest.raises(WaitTimeoutError):
        client.wait("a", timeout_seconds=0.2)
    done = again.status.but(phase=JobPhase.COMPLETED, observed_retry_nonce=again.spec.retry_nonce)
    (stored,) = server.put(again.but(status=done))
    assert client.wait("a", timeout_seconds=20).is_reached
    newer = stored.metadata.resource_version + 1
    with pytest.raises(WaitTimeoutError):
        client.wait("a", revision=newer, timeout_seconds=0.2)


def test_running_is_when_an_execution_runs(client: Client, server: RunningServer) -> None:
    """Not when the job is called Running, which it is once its executions are placed."""
    job = stored_job("a", phase=JobPhase.RUNNING)
    one = make_execution(job, phase=Phase.PREPARING)
    old = make_execution(job, 1, phase=Phase.RUNNING)
    of_before = old.spec.slot.but(generation=0)
    server.put(job, one, old.but(spec=old.spec.but(slot=of_before)))
    told: list[str] = []

    def on_execution(execution: Execution) -> None:
        told.append(execution.name)
        if len(told) == 1:
            with pytest.raises(WaitTimeoutError):
                client.wait("a", goal="running", timeout_seconds=0)
            server.put(make_execution(job, phase=Phase.RUNNING))

    waited = client.wait("a", goal="running", timeout_seconds=20, on_execution=on_execution)
    assert waited.is_reached
    assert told[0] == one.name


def test_a_job_that_fails_before_anything_runs_is_not_waited_for(
    client: Client, server: RunningServer
) -> None:
    job = stored_job("a", phase=JobPhase.RUNNING)
    server.put(job, make_execution(job, phase=Phase.PREPARING))

    def on_execution(execution: Execution) -> None:
        server.put(stored_job("a", phase=JobPhase.FAILED))

    waited = client.wait("a", goal="running", timeout_seconds=20, on_execution=on_execution)
    assert not waited.is_reached


async def test_the_asynchronous_client_waits_for_a_run_as_well(server: RunningServer) -> None:
    job = stored_job("a", phase=JobPhase.RUNNING)
    server.put(job, make_execution(job, phase=Phase.PREPARING))
    async with AsyncClient(server.url) as client:
        with pytest.raises(WaitTimeoutError):
            await client.wait("a", goal="running", timeout_seconds=0.1)

        def on_execution(execution: Execution) -> None:
            server.put(make_execution(job, phase=Phase.RUNNING))

        waited = await client.wait(
            "a", goal="running", timeout_seconds=20, on_execution=on_execution
        )
        assert waited.is_reached


def test_wait_for_what_is_not_there_or_goes_away(client: Client, server: RunningServer) -> None:
    with pytest.raises(NotFoundError):
        client.wait("never", timeout_seconds=20)
    server.put(stored_job("a"))

    def on_update(job: Job) -> None:
        server.drop(job.ref)

    with pytest.raises(NotFoundError):
        client.wait("a", on_update=on_update, timeout_seconds=20)


def test_a_watch_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    with running_server(tmp_path) as first:
        first.put(stored_job("a"))
        port = int(first.url.rsplit(":", 1)[1])
        client = Client(first.url)
        watch = client.watch(Job, fields="name=a", timeout_seconds=30)
        assert next(watch).type == "ADDED"
        assert next(watch).type == "SYNCED"
    with running_server(tmp_path, port=port) as second:
        second.put(stored_job("b"))  # memory stores count from one each: go beyond the first's
        second.put(stored_job("a", phase=JobPhase.COMPLETED))
        found = next(u for u in watch if u.item and u.item.status.phase is JobPhase.COMPLETED)
        assert found.type == "ADDED"
        watch.close()  # type: ignore[attr-defined]
        client.close()


def test_closing_the_server_ends_watches_at_once(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, httpx.Client(base_url=server.url) as http:
        stream = events(http)
        next(stream)
        stopped = threading.Thread(target=server.stop)
        began = time.monotonic()
        stopped.start()
        kinds = [(kind, item and item["reason"]) for _, kind, item in stream]
        stopped.join()
        assert kinds == [("ERROR", "ServerClosing")]
        assert time.monotonic() - began < 2.5


def test_typed_watch_of_executions(client: Client, server: RunningServer) -> None:
    job = stored_job("a")
    server.put(job, make_execution(job))
    updates = client.watch(Execution, fields="job=a", timeout_seconds=5)
    first = next(updates)
    assert isinstance(first.item, Execution)
    assert first.item.spec.job == "a"
    updates.close()  # type: ignore[attr-defined]


def test_names_with_line_separators_do_not_break_lines(
    client: Client, server: RunningServer
) -> None:
    job = stored_job("odd").with_meta(annotations={"text": "one\u2028two\u0085three"})
    server.put(job)
    updates = client.watch(Job, fields="name=odd", timeout_seconds=5)
    item = next(updates).item
    assert item is not None
    assert item.metadata.annotations["text"] == "one\u2028two\u0085three"
    updates.close()  # type: ignore[attr-defined]
