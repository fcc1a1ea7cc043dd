"""`wasm run` from the module to its output, with real processes: what it prints, and exit codes."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from bacalhau_api.v1.job import Job
from tests.e2e.cluster import BACALHAU, Cluster, environment

HELLO = str(Path(__file__).parents[1] / "programs" / "hello.wasm")
WALK = str(Path(__file__).parents[1] / "programs" / "walk.wasm")

# Goes on for so long that it never ends by itself while a test looks at it.
LONG = (HELLO, "--tick", "2400")

Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and one node."""
    made = Cluster(tmp_path_factory.mktemp("fleet"))
    data = made.root / "data"
    data.mkdir()
    (data / "words.txt").write_text("one two\n")
    made.start(["edge-1"], args=["--allow-path", f"{data}/**", "--on-exit", "stop"])
    yield made
    assert made.close() == []


def run(cluster: Cluster, *words: str) -> Done:
    """`bacalhau wasm run …`, whatever its exit code."""
    return cluster.run("wasm", "run", *words, check=False)


def start(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    """A command that goes on, begun as a terminal would: a shell's background job ignores
    Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*BACALHAU, *words],
            env={**environment(), "BACALHAU_SERVER": cluster.server},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def read_until(stream: IO[str], text: str) -> list[str]:
    """Its lines, up to the first with that text."""
    lines: list[str] = []
    while text not in (line := stream.readline()):
        assert line, f"it ended without {text!r}: {lines}"
        lines.append(line)
    return [*lines, line]


def name_in(text: str) -> str:
    """The job of a line such as `job/NAME created`."""
    found = re.search(r"^job/(\S+) created$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


def get(cluster: Cluster, what: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.run("get", what, *words, "-o", "json").stdout)
    return found


def test_it_waits_and_says_where_the_output_is(cluster: Cluster) -> None:
    done = run(cluster, HELLO, "a", "--b")
    name = name_in(done.stdout)
    assert name.startswith("hello-")
    assert done.stdout == f"job/{name} created\njob/{name} complete\n"
    assert f"bacalhau logs {name}" in done.stderr
    assert "hello a --b\n" in cluster.run("logs", name).stdout


def test_followed_only_the_output_is_on_stdout(cluster: Cluster) -> None:
    done = run(cluster, "--follow", HELLO, "--tick", "3")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("env ")]
    assert lines == ["hello --tick 3", "tick 0", "tick 1", "tick 2"]
    assert "to stderr\n" in done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize("flags", [[], ["-f"], ["-q"]], ids=["wait", "follow", "quiet"])
def test_the_exit_code_is_that_of_the_process(cluster: Cluster, flags: list[str]) -> None:
    done = run(cluster, *flags, "--attempts", "1", HELLO, "--exit", "7")
    assert done.returncode == 7
    assert "exit code 7" in done.stderr
    assert "bacalhau explain job hello-" in done.stderr
    assert ("hello --exit 7" in done.stderr) == (flags != ["-f"]), "its last words, once"


def test_of_several_slots_it_is_3(cluster: Cluster) -> None:
    assert run(cluster, "--count", "2", "--attempts", "1", HELLO, "--exit", "7").returncode == 3
    assert run(cluster, "--target", "all", "--attempts", "1", HELLO, "--exit", "7").returncode == 3


def test_an_attempt_that_follows_another_is_announced(cluster: Cluster) -> None:
    done = run(cluster, "-f", "--attempts", "2", HELLO, "--exit", "7")
    assert done.stdout.count("hello --exit 7") == 2
    assert re.search(r"^\[hello-\S+\] attempt 2 of slot 0$", done.stderr, re.MULTILINE)


def test_quiet_prints_the_name_alone(cluster: Cluster) -> None:
    done = run(cluster, "--id-only", HELLO)
    assert re.fullmatch(r"hello-[0-9a-f]{6}\n", done.stdout)
    assert done.stderr == ""
    assert get(cluster, f"job/{done.stdout.strip()}")["status"]["phase"] == "Completed"


def test_without_waiting(cluster: Cluster) -> None:
    for flag in ("--no-wait", "--wait=false"):
        done = run(cluster, flag, HELLO)
        assert done.stdout == f"job/{name_in(done.stdout)} created\n"
        assert done.returncode == 0


def test_a_wait_that_is_over_leaves_the_job(cluster: Cluster) -> None:
    done = run(cluster, "--wait-timeout", "5", "--constraints", "zone=nowhere", HELLO)
    assert done.returncode == 4
    assert "zone" in done.stderr
    cluster.run("delete", "job", name_in(done.stdout))


def test_a_named_job_runs_again(cluster: Cluster) -> None:
    assert run(cluster, "--name", "again", HELLO, "1").returncode == 0
    done = run(cluster, "--name", "again", HELLO, "1")
    assert done.stdout.splitlines() == [
        "job/again runs again as generation 2",
        "job/again complete",
    ]
    changed = run(cluster, "--name", "again", HELLO, "2")
    assert changed.stdout.splitlines()[-1] == "job/again complete"
    assert get(cluster, "job/again")["metadata"]["generation"] in (3, 4)
    assert "hello 2" in cluster.run("logs", "again").stdout


def test_one_that_goes_on_is_joined(cluster: Cluster) -> None:
    words = ("--name", "joined", *LONG)
    assert run(cluster, "--no-wait", *words).returncode == 0
    second = start(cluster, "wasm", "run", "-f", *words)
    assert second.stdout is not None
    read_until(second.stdout, "tick 1\n")
    assert get(cluster, "job/joined")["metadata"]["generation"] == 1
    cluster.run("stop", "joined")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 3
    assert "job joined is Stopped" in err


def test_inputs_outputs_and_download(cluster: Cluster) -> None:
    into = cluster.root / "results"
    done = run(
        cluster, "--download", "--output-dir", str(into), "-o", "out:/out",
        "-i", f"{cluster.root}/data:/in", WALK, "write", "/out/list.txt", "made here",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (into / "out" / "list.txt").read_text() == "made here"
    assert str(into) in done.stdout
    listed = run(cluster, "-f", "-i", f"file://{cluster.root}/data:/in", WALK, "/in")
    assert listed.stdout == "/in/words.txt 8\n"


def test_what_a_dry_run_prints_can_be_applied(cluster: Cluster) -> None:
    text = run(cluster, "--dry-run", "--name", "declared", "--count", "2", HELLO, "x").stdout
    file = cluster.root / "declared.yaml"
    file.write_text(text)
    assert cluster.run("apply", "-f", str(file)).stdout == "job/declared created\n"
    cluster.run("wait", "declared", "--timeout", "60")
    again = run(cluster, "--no-wait", "--name", "declared", "--count", "2", HELLO, "x")
    assert again.stdout == "job/declared runs again as generation 2\n", "they are the same job"
    assert cluster.run("apply", "-f", str(file)).stdout == "job/declared unchanged\n"
    assert Job.decode(json.dumps(get(cluster, "job/declared"))).spec.count == 2


@pytest.mark.parametrize("flags", [[], ["-f"]], ids=["wait", "follow"])
def test_ctrl_c_leaves_the_job_and_says_how_to_come_back(
    cluster: Cluster, flags: list[str]
) -> None:
    name = f"interrupted{'-f' if flags else ''}"
    started = start(cluster, "wasm", "run", *flags, "--name", name, *LONG)
    assert started.stdout is not None
    assert started.stderr is not None
    # Only then there is something to leave alone.
    if flags:
        read_until(started.stdout, "tick 1\n")
    else:
        read_until(started.stderr, "Running")
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    verb = "logs -f" if flags else "wait"
    assert f"the job goes on; come back with: bacalhau {verb} {name}" in err
    assert f"bacalhau stop {name}" in err
    assert "Traceback" not in err
    assert get(cluster, f"job/{name}")["status"]["phase"] == "Running"
    cluster.run("stop", name)


def test_logs_are_whole_through_kill_9_of_the_server(cluster: Cluster) -> None:
    """Followed over a restart, every line comes once."""
    assert run(cluster, "--no-wait", "--name", "long", HELLO, "--tick", "400").returncode == 0
    follower = start(cluster, "logs", "-f", "--stream", "stdout", "long")
    assert follower.stdout is not None
    lines = read_until(follower.stdout, "tick 1\n")
    cluster.orchestrator.kill()
    cluster.orchestrator.start()
    # Not `communicate`, which knows nothing of what the stream has read ahead.
    lines += list(follower.stdout)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 0, err
    ticks = [line for line in lines if line.startswith("tick ")]
    assert ticks == [f"tick {i}\n" for i in range(400)]
    assert "the connection to the server is lost" in err
    assert "the connection is back" in err


def test_wait_says_that_the_server_is_away(cluster: Cluster) -> None:
    assert run(cluster, "--no-wait", "--name", "away", *LONG).returncode == 0
    waiter = start(cluster, "wait", "away")
    assert waiter.stderr is not None
    read_until(waiter.stderr, "Running")
    cluster.orchestrator.kill()
    read_until(waiter.stderr, "does not answer; trying again")
    cluster.orchestrator.start()
    cluster.run("stop", "away")
    _, err = waiter.communicate(timeout=60)
    assert waiter.returncode == 3
    assert "job away is Stopped" in err


def test_completion_offers_names(cluster: Cluster) -> None:
    run(cluster, "--no-wait", "--name", "complete-me", HELLO)
    offered: list[str] = []
    deadline = time.monotonic() + 60
    while not offered:  # a server that takes longer than a second is not waited for
        assert time.monotonic() < deadline
        done = subprocess.run(
            [*BACALHAU],
            env={
                **environment(),
                "BACALHAU_SERVER": cluster.server,
                "_BACALHAU_COMPLETE": "complete_bash",
                "COMP_WORDS": "bacalhau logs compl",
                "COMP_CWORD": "2",
            },
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        offered = done.stdout.split()
    assert offered == ["complete-me"]
    assert "complete -o default -F" in cluster.run("completion", "bash").stdout
    assert os.environ.get("_BACALHAU_COMPLETE") is None
