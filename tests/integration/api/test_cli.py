"""The command line against a running server: output, and exit codes by real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bacalhau_api.meta import Contact, Ref, Waiting
from bacalhau_api.v1.execution import (
    Outputs,
    Phase,
    Publication,
    PublicationPhase,
    PublicationReport,
    PublicationSpec,
    PublicationStatus,
)
from bacalhau_api.v1.job import Job, JobPhase, RuleCount, SlotCounts, SpecConfig, Verdict
from tests.support.api_objects import (
    T0,
    make_acceptance,
    make_execution,
    make_node,
    stored_job,
)
from tests.support.api_server import RunningServer, Shell

ROOT = Path(__file__).parents[3]

MANIFEST = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: a}
spec:
  type: batch
  tasks: [{name: main, engine: {type: noop}}]
---
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: b}
spec:
  type: batch
  tasks: [{name: main, engine: {type: noop}}]
"""


def process(server: str, *words: str, **more: str) -> subprocess.Popen[str]:
    """Start a real `bacalhau`, as a terminal would: a shell's background job ignores Ctrl-C."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    environment = {**os.environ, "PYTHONPATH": path, "BACALHAU_SERVER": server, **more}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "bacalhau", *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def finish(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit code, stdout and stderr."""
    out, err = started.communicate(timeout=60)
    return started.returncode, out, err


def test_apply_says_what_it_did(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(MANIFEST)
    assert shell("apply", "-f", str(file), "--dry-run")[1] == (
        "job/a created (dry run)\njob/b created (dry run)\n"
    )
    assert shell("apply", "-f", str(file)) == (0, "job/a created\njob/b created\n", "")
    assert shell("apply", "-f", str(file))[1] == "job/a unchanged\njob/b unchanged\n"
    file.write_text(MANIFEST.replace("{name: b}", "{name: b, labels: {x: y}}"))
    assert shell("apply", "-f", str(file))[1] == "job/a unchanged\njob/b configured\n"


def test_apply_sends_nothing_if_anything_is_wrong(
    shell: Shell, server: RunningServer, tmp_path: Path
) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(MANIFEST + "---\nkind: Jab\n")
    code, out, err = shell("apply", "-f", str(file))
    assert (code, out) == (1, "")
    assert "jobs.yaml" in err
    assert all(line.startswith(("error: ", "hint: ")) for line in err.splitlines())
    assert server.all("Job") == ()


def test_apply_goes_on_after_a_refusal_but_fails(
    shell: Shell, server: RunningServer, tmp_path: Path
) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(MANIFEST)
    shell("apply", "-f", str(file))
    code, out, _ = shell("delete", "job/a", "--no-wait")
    assert (code, out) == (0, "job/a deleting (waits until its executions are cleaned up)\n")
    code, out, err = shell("apply", "-f", str(file))
    assert code == 1
    assert out == "job/b unchanged\n"
    assert "being deleted" in err


def test_what_get_prints_can_be_applied(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "jobs.yaml"
    file.write_text(MANIFEST)
    shell("apply", "-f", str(file))
    for form in ("json", "yaml"):
        _, out, _ = shell("get", "jobs", "-o", form)
        again = tmp_path / f"again.{form}"
        again.write_text(out)
        code, out, _ = shell("apply", "-f", str(again))
        assert (code, out) == (0, "job/a unchanged\njob/b unchanged\n")


def test_get_forms(shell: Shell, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    server.put(job, make_execution(job, phase=Phase.FAILED, exit_code=3), make_node())
    assert shell("get", "jobs")[1].splitlines()[0].split() == [
        "NAME",
        "TYPE",
        "PHASE",
        "DONE",
        "AGE",
    ]
    assert shell("get", "jobs", "-A")[1].startswith("NAMESPACE")
    assert "WAITS FOR" in shell("get", "job", "a", "-o", "wide")[1]
    assert shell("get", "jobs", "-o", "name")[1] == "job/a\n"
    item = json.loads(shell("get", "job/a", "-o", "json")[1])
    assert item["status"]["phase"] == "Running"
    listed = yaml.safe_load(shell("get", "jobs", "-o", "yaml")[1])
    assert [i["metadata"]["name"] for i in listed["items"]] == ["a"]
    assert "Failed" in shell("get", "executions", "--field-selector", "phase=Failed")[1]
    assert "Ready" in shell("get", "job/a", "node/n1")[1]
    assert shell("get", "jobs", "-n", "other") == (0, "", "no jobs found\n")
    assert json.loads(shell("get", "jobs", "-n", "other", "-o", "json")[1])["items"] == []


def test_how_far_publications_are(shell: Shell, server: RunningServer) -> None:
    job = stored_job(count=3, phase=JobPhase.COMPLETED)
    target = SpecConfig(type="s3")
    sent, waits, without = (make_execution(job, n, phase=Phase.SUCCEEDED) for n in range(3))
    task = sent.spec.task.but(publisher=target)
    sent, waits = (e.but(spec=e.spec.but(task=task)) for e in (sent, waits))
    upload = Waiting(what="Upload", message="12 of 64 MiB, 2.0 MiB/s", since=T0, mover="node n1")
    report = PublicationReport(
        step=2, incarnation="i", phase=PublicationPhase.PUBLISHING, waiting=upload
    )
    for execution, status in (
        (sent, PublicationStatus(report=report)),
        (waits, PublicationStatus()),
    ):
        spec = PublicationSpec(
            job=job.name,
            job_uid=job.metadata.uid,
            execution=execution.name,
            execution_uid=execution.metadata.uid,
            node="n1",
            slot=execution.spec.slot,
            publisher=target,
        )
        meta = execution.metadata.but(uid=f"p-{execution.metadata.uid}", resource_version=0)
        server.put(Publication(metadata=meta, spec=spec, status=status))
    server.put(job, sent, waits, without)
    out = shell("get", "executions", "-o", "wide")[1]
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert "Publishing: 12 of 64 MiB, 2.0 MiB/s" in rows[sent.name]
    assert "Pending" in rows[waits.name]
    assert "Publishing" not in shell("get", "executions")[1]
    assert "12 of 64 MiB" in shell("get", "publications", "-o", "wide")[1]
    described = shell("describe", "execution", sent.name)[1]
    (line,) = (line for line in described.splitlines() if line.startswith("Published:"))
    assert line.endswith("Publishing: 12 of 64 MiB, 2.0 MiB/s")
    assert "12 of 64 MiB" in shell("describe", "job", "a")[1]
    assert "publication" not in shell("get", "executions", "-o", "json")[1]


def test_describe_and_explain_say_what_is_waited_for(shell: Shell, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.QUEUED)
    waiting = Waiting(
        what="Capacity", message="no node has 64 GB free\x1b[2J", since=T0, mover="job reconciler"
    )
    verdict = Verdict(
        slot="0", time=T0, nodes_total=3, nearest="n1", remedy="ask for 16 GB of memory",
        rejected=(RuleCount(rule="resources", nodes=3, example="n1: 16 GB"),),
    )  # fmt: skip
    status = job.status.but(
        waiting=waiting, verdicts=(verdict,), slots=SlotCounts(total=1, waiting=1)
    )
    server.put(job.but(status=status))
    for words in (("describe", "job", "a"), ("explain", "job/a")):
        code, out, _ = shell(*words)
        assert code == 0
        assert "waiting: no node has 64 GB free[2J (Capacity, for " in out
        assert "moved next by: job reconciler, without a deadline" in out
        assert "resources turned down 3, such as: n1: 16 GB" in out
        assert "try: ask for 16 GB of memory" in out
        assert "\x1b" not in out
    told = json.loads(shell("explain", "job", "a", "-o", "json")[1])
    assert told["waiting"]["mover"] == "job reconciler"


def test_the_disconnect_policy_is_told_with_its_reason(shell: Shell, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.RUNNING)
    execution = make_execution(job, phase=Phase.RUNNING)
    server.put(job, execution.but(status=execution.status.but(contact=Contact.UNKNOWN)))
    policy = "replace after 30 min: a new attempt begins elsewhere; the first result wins"
    _, out, _ = shell("describe", "job", "a")
    assert f"If cut off: {policy} (the default for batch jobs)" in " ".join(out.split())
    _, out, _ = shell("explain", "job", "a")
    assert f"the job's disconnect policy is {policy} (the default for batch jobs)" in out


@pytest.mark.parametrize("kind", ["job", "execution", "node", "acceptance"])
def test_every_kind_can_be_described(shell: Shell, server: RunningServer, kind: str) -> None:
    job = stored_job(phase=JobPhase.COMPLETED)
    execution = make_execution(job, phase=Phase.SUCCEEDED, exit_code=0, stdout_tail="bye\n")
    acceptance = make_acceptance(execution, job)
    server.put(job, execution, acceptance, make_node())
    name = {"job": "a", "execution": execution.name, "node": "n1", "acceptance": acceptance.name}[
        kind
    ]
    code, out, err = shell("describe", kind, name)
    assert (code, err) == (0, "")
    assert "Name:" in out
    assert "History:" in out


def test_wait_exit_codes(shell: Shell, server: RunningServer) -> None:
    server.put(
        stored_job("done", phase=JobPhase.COMPLETED),
        stored_job("bad", phase=JobPhase.FAILED),
        stored_job("open", phase=JobPhase.RUNNING),
    )
    assert shell("wait", "done")[0] == 0
    # Its executions are placed, but none runs yet.
    assert shell("wait", "open", "--for", "running", "--timeout", "0")[0] == 4
    server.put(make_execution(stored_job("open"), phase=Phase.RUNNING))
    assert shell("wait", "open", "--for", "running", "--timeout", "0")[0] == 0
    assert shell("wait", "open", "--for", "running")[0] == 0
    assert shell("wait", "done", "--for", "running")[0] == 0
    assert shell("wait", "done", "--timeout", "0")[0] == 0
    assert shell("wait", "open", "--timeout", "0")[0] == 4
    code, _, err = shell("wait", "job/bad")
    assert code == 3
    assert "error: job bad is Failed" in err
    code, _, err = shell("wait", "open", "--timeout", "0.2")
    assert code == 4
    assert "bacalhau wait open" in err
    assert shell("wait", "none")[0] == 5
    assert shell("wait", "open", "--for", "ever")[0] == 2


def test_stop_rerun_suspend_delete(shell: Shell, server: RunningServer) -> None:
    server.put(stored_job(phase=JobPhase.RUNNING))
    assert shell("stop", "a")[1] == "job/a stopping\n"
    assert shell("rerun", "job/a")[1] == "job/a runs again as generation 2\n"
    code, _, err = shell("rerun", "a", "--failed")
    assert code == 1
    assert "is not over" in err
    failed = stored_job("f", count=3, phase=JobPhase.FAILED)
    server.put(
        failed.but(status=failed.status.but(slots=SlotCounts(total=3, succeeded=1, failed=1)))
    )
    assert shell("rerun", "f", "--failed")[1] == "job/f runs 2 of 3 slots again\n"
    assert shell("suspend", "a")[1] == "job/a suspended\n"
    assert shell("resume", "a")[1] == "job/a resumed\n"
    assert shell("delete", "job", "a")[1] == "job/a deleted\n"
    assert shell("delete", "job/a")[0] == 5
    assert shell("delete", "job/a", "--ignore-not-found")[0] == 0
    assert shell("delete", "execution/x")[0] == 1
    assert "Deleted" in shell("history", "job", "a")[1]


def test_node_verbs_and_token(shell: Shell, server: RunningServer) -> None:
    server.put(make_node())
    for verb, word in (("cordon", "cordoned"), ("drain", "draining"), ("uncordon", "uncordoned"),
                       ("reject", "rejected"), ("approve", "approved")):  # fmt: skip
        assert shell("node", verb, "n1")[1] == f"node/n1 {word}\n"
    code, out, err = shell("node", "token", "--node", "edge-1")
    assert code == 0
    assert out.startswith("bjt-")
    assert len(out.splitlines()) == 1
    assert "--role compute" in err


def test_logs_and_download(shell: Shell, server: RunningServer, tmp_path: Path) -> None:
    job = stored_job(count=2, phase=JobPhase.COMPLETED)
    job = job.but(status=job.status.but(slots=SlotCounts(total=2, succeeded=2)))
    executions = [
        make_execution(job, i, phase=Phase.SUCCEEDED, exit_code=0, outputs=Outputs(files=1))
        for i in range(2)
    ]
    server.put(job, *executions, *[make_acceptance(e, job) for e in executions], make_node())
    for i, execution in enumerate(executions):
        server.nodes.write("n1", execution.name, "stdout", f"out {i}\n")
        server.nodes.write("n1", execution.name, "stderr", f"err {i}\n")
        server.nodes.finish("n1", execution.name)
    code, out, err = shell("logs", "a")
    assert code == 0
    assert sorted(out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(err.splitlines()) == ["[0] err 0", "[1] err 1"]
    assert shell("logs", executions[0].name, "--stream", "stdout")[1] == "out 0\n"
    assert shell("logs", "nothing")[0] == 5
    code, out, _ = shell("download", "a", "-o", str(tmp_path / "out"))
    assert code == 0
    assert (tmp_path / "out/stdout").read_text() == "out 0\nout 1\n"
    assert shell("download", "a", "-o", str(tmp_path / "out"))[0] == 1
    one = f"execution/{executions[1].name}"
    assert shell("download", one, "-o", str(tmp_path / "one"))[0] == 0
    assert (tmp_path / "one/stdout").read_text() == "out 1\n"


def test_logs_of_a_job_whose_node_is_away_are_not_whole(
    shell: Shell, server: RunningServer
) -> None:
    job = stored_job(count=2, phase=JobPhase.COMPLETED)
    here = make_execution(job, 0, phase=Phase.SUCCEEDED)
    gone = make_execution(job, 1, node="n2", phase=Phase.SUCCEEDED)
    server.put(job, here, gone)
    server.nodes.write("n1", here.name, "stdout", "out\n")
    server.nodes.finish("n1", here.name)
    server.nodes.away.add("n2")
    code, out, err = shell("logs", "a")
    assert (code, out) == (6, "[0] out\n")
    assert "which is away" in err
    assert shell("logs", gone.name)[0] == 6
    server.put(make_execution(job, 1, node="n2", phase=Phase.SUCCEEDED, stdout_tail="end\n"))
    for words in (("logs", "a"), ("logs", gone.name)):
        code, out, err = shell(*words)
        assert code == 6, "these are only its last bytes"
        assert out.endswith("end\n")
        assert "last bytes" in err


def test_download_of_a_job_that_goes_on(
    shell: Shell, server: RunningServer, tmp_path: Path
) -> None:
    job = stored_job(count=2, phase=JobPhase.RUNNING)
    job = job.but(status=job.status.but(slots=SlotCounts(total=2, running=1, succeeded=1)))
    execution = make_execution(job, phase=Phase.SUCCEEDED, exit_code=0)
    server.put(job, execution, make_node())
    assert shell("download", "a")[0] == 5
    server.put(make_acceptance(execution, job))
    server.nodes.write("n1", execution.name, "stdout", "part\n")
    code, _, err = shell("download", "a", "-o", str(tmp_path / "out"))
    assert code == 1
    assert "--partial" in err
    assert shell("download", "a", "-o", str(tmp_path / "out"), "--partial")[0] == 0


def test_nothing_of_an_object_reaches_the_terminal_raw(shell: Shell, server: RunningServer) -> None:
    job = stored_job(phase=JobPhase.FAILED).with_meta(labels={"x": "\x1b]0;owned\x07"})
    evil = "\x1b[2J\u202egnp.exe\r\n\x9b31m"
    job = job.but(status=job.status.but(message=evil, reason="Failed"))
    execution = make_execution(job, phase=Phase.FAILED, exit_code=1, stdout_tail=evil)
    server.put(job, execution, make_node())
    for words in (
        ("get", "jobs", "-o", "wide"), ("describe", "job", "a"), ("explain", "job", "a"),
        ("history", "job", "a"), ("wait", "a"), ("get", "executions", "-o", "wide"),
        ("describe", "execution", execution.name), ("get", "nodes", "-o", "wide"),
    ):  # fmt: skip
        _, out, err = shell(*words)
        for character in ("\x1b", "\u202e", "\x9b", "\r", "\x07"):
            assert character not in out + err, words


def test_get_watch_prints_rows_as_they_change(server: RunningServer) -> None:
    server.put(stored_job())
    started = process(server.url, "get", "jobs", "--watch")
    assert started.stdout is not None
    assert started.stdout.readline().startswith("NAME")
    assert "Pending" in started.stdout.readline()
    server.put(stored_job(phase=JobPhase.RUNNING))
    assert "Running" in started.stdout.readline()
    server.drop(Ref("Job", "default", "a"))
    assert "(deleted)" in started.stdout.readline()
    started.send_signal(signal.SIGINT)
    code, _, err = finish(started)
    assert (code, err) == (130, "")


def test_ctrl_c_while_waiting_leaves_the_job_and_says_so(server: RunningServer) -> None:
    server.put(stored_job(phase=JobPhase.RUNNING))
    started = process(server.url, "wait", "a")
    assert started.stderr is not None
    assert "job/a Running" in started.stderr.readline()
    started.send_signal(signal.SIGINT)
    code, _, err = finish(started)
    assert code == 130
    assert "bacalhau wait a" in err
    assert "Traceback" not in err
    found = server.get(Ref("Job", "default", "a"))
    assert isinstance(found, Job)
    assert not found.is_stopped


def test_exit_codes_of_processes(server: RunningServer) -> None:
    assert finish(process(server.url, "version"))[:2] == (
        0, f"client: 0.1.0\nserver: 0.1.0 ({server.url})\n"
    )  # fmt: skip
    assert finish(process(server.url, "get", "job/none"))[0] == 5
    assert finish(process(server.url, "frobnicate"))[0] == 2
    assert finish(process(server.url, "get", "frobs"))[0] == 2
    code, out, err = finish(process("http://127.0.0.1:1", "get", "jobs"))
    assert (code, out) == (6, "")
    assert "bacalhau serve" in err
    assert finish(process("http://127.0.0.1:1", "version"))[0] == 0
    assert finish(process("nonsense://x", "get", "jobs"))[0] == 1


def test_output_into_a_closed_pipe_is_quiet(server: RunningServer) -> None:
    padded = {"pad": "x" * 60_000}  # 6 MB in all: more than any pipe holds
    server.put(*(stored_job(f"j{i}").with_meta(annotations=padded) for i in range(100)))
    started = process(server.url, "get", "jobs", "-o", "json")
    assert started.stdout is not None
    started.stdout.readline()
    started.stdout.close()
    assert started.stderr is not None
    assert started.stderr.read() == ""
    started.stderr.close()
    assert started.wait(60) == 141


def test_version_starts_fast() -> None:
    """Without the framework, HTTP client or models: by what is loaded, not by the clock."""
    code = "import sys; sys.argv[1:] = ['version', '--client']\nfrom bacalhau.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint(sorted(sys.modules))"
    path = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    for heavy in ("typer", "httpx", "pydantic", "yaml", "rich", "asyncio"):
        assert f"'{heavy}'" not in done.stdout, heavy
