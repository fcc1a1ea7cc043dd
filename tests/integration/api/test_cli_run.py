"""What the command line says around running jobs, against a server without nodes."""

import threading
from pathlib import Path

import pytest

from bacalhau.cli.app import run
from bacalhau_api.meta import Ref, Waiting
from bacalhau_api.v1.execution import Phase
from bacalhau_api.v1.job import Job, JobPhase
from tests.support.api_objects import T0, make_execution, stored_job
from tests.support.api_server import RunningServer

HELLO = str(Path(__file__).parents[2] / "programs" / "hello.wasm")
JOB = Ref("Job", "default", "a")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _environment(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACALHAU_SERVER", server.url)
    monkeypatch.delenv("BACALHAU_TOKEN", raising=False)


def test_run_sends_what_a_dry_run_prints(server: RunningServer, capsys: Capture) -> None:
    words = ["--name", "a", "--count", "2", "-e", "A=b", HELLO, "one", "--two"]
    assert run(["wasm", "run", "--no-wait", *words]) == 0
    assert capsys.readouterr().out == "job/a created\n"
    sent = server.get(JOB)
    assert isinstance(sent, Job)
    assert run(["delete", "job", "a", "--no-wait", "--force"]) == 0
    capsys.readouterr()
    assert run(["wasm", "run", "--dry-run", *words]) == 0
    printed = capsys.readouterr().out
    file = server.nodes.root.parent / "a.yaml"
    file.write_text(printed)
    assert run(["apply", "-f", str(file)]) == 0
    applied = server.get(JOB)
    assert isinstance(applied, Job)
    assert applied.spec == sent.spec


def test_a_server_named_among_the_flags_is_asked(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("BACALHAU_SERVER", "http://127.0.0.1:1")
    assert run(["wasm", "run", "--no-wait", HELLO]) == 6
    assert "no server answers" in capsys.readouterr().err
    assert run(["wasm", "run", "--no-wait", "--server", server.url, HELLO]) == 0
    host, _, port = server.url.removeprefix("http://").partition(":")
    assert (
        run(["wasm", "run", "-q", "--wait=false", "--api-host", host, "--api-port", port, HELLO])
        == 0
    )
    # Behind the module it is the program's.
    assert run(["wasm", "run", "--no-wait", HELLO, "x", "--server", server.url]) == 6


def test_a_job_of_another_type_is_not_replaced(server: RunningServer, capsys: Capture) -> None:
    assert run(["wasm", "run", "--no-wait", "--name", "a", HELLO]) == 0
    capsys.readouterr()
    assert run(["wasm", "run", "--no-wait", "--name", "a", "--type", "service", HELLO]) == 1
    assert "cannot change from batch to service" in capsys.readouterr().err


def test_logs_of_a_job_that_waits_say_for_what(server: RunningServer, capsys: Capture) -> None:
    job = stored_job(phase=JobPhase.QUEUED)
    waiting = Waiting(what="Capacity", message="no node fits", since=T0, mover="job reconciler")
    server.put(job.but(status=job.status.but(waiting=waiting)))
    assert run(["logs", "a"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Queued" in captured.err
    assert "no node fits" in captured.err
    assert "bacalhau explain job a" in captured.err


def test_a_failure_shows_the_last_words(server: RunningServer, capsys: Capture) -> None:
    job = stored_job(phase=JobPhase.FAILED)
    tail = "".join(f"line {i}\x1b[2J\n" for i in range(30))
    execution = make_execution(job, phase=Phase.FAILED, exit_code=3, stdout_tail=tail)
    server.put(job, execution)
    assert run(["wait", "a"]) == 3
    err = capsys.readouterr().err
    assert err.count(f"[{execution.name}] line ") == 10
    assert "line 29" in err
    assert "\x1b" not in err


def test_delete_waits_until_the_job_is_gone(server: RunningServer, capsys: Capture) -> None:
    assert run(["wasm", "run", "--no-wait", "--name", "a", HELLO]) == 0
    capsys.readouterr()
    finish = threading.Timer(0.5, server.drop, [JOB])
    finish.start()
    assert run(["delete", "job/a", "--timeout", "60"]) == 0
    finish.join()
    assert capsys.readouterr().out == "job/a deleted\n"
    assert server.get(JOB) is None


def test_delete_does_not_wait_for_ever(server: RunningServer, capsys: Capture) -> None:
    assert run(["wasm", "run", "--no-wait", "--name", "a", HELLO]) == 0
    capsys.readouterr()
    assert run(["delete", "job/a", "--timeout", "0.2"]) == 0
    told = capsys.readouterr().out
    assert told == "job/a deleting (waits until its executions are cleaned up)\n"
