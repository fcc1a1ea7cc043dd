"""`plan`, `diff`, `apply --plan`, `history`, `get --at`, `rollback`, `simulate`, `explain --job` against
a running server: what they print, and the exit codes that CI goes by."""

import json
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from bacalhau.cli.app import run
from bacalhau.cli.origin import origin_of
from bacalhau_api.admission import retire
from bacalhau_api.meta import Ref
from bacalhau_api.v1.job import Job, JobPhase
from tests.support.api_server import RunningServer
from tests.support.job_world import make_node

MANIFEST = """
apiVersion: bacalhau.org/v1
kind: Job
metadata: {name: a}
spec:
  type: batch
  tasks: [{name: main, engine: {type: noop}, env: {MODE: x}, resources: {cpu: 100m, memory: 1Mi}}]
"""

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shell(
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Shell:
    """Run a command line in this process, in an empty directory: (exit code, stdout, stderr)."""
    monkeypatch.setenv("BACALHAU_SERVER", server.url)
    monkeypatch.delenv("BACALHAU_TOKEN", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run_line(*words: str) -> tuple[int, str, str]:
        code = run(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_line


def write(text: str, name: str = "a.yaml") -> str:
    """A file in the working directory."""
    Path(name).write_text(text)
    return name


def test_plan_shows_consequences_and_tells_them_by_exit_code(
    shell: Shell, server: RunningServer
) -> None:
    server.put(make_node("n1"))
    code, out, err = shell("plan", "-f", write(MANIFEST))
    assert code == 2
    assert "+ job/a is created and runs (a.yaml:2)" in out
    assert "    start slot 0 on n1" in out
    assert "not heard from: replace after 1800 s, reconcile firstAccepted (the default" in out
    assert "1 to create, 0 to change, 0 to delete, 0 unchanged; executions: 1 start" in out
    assert "bacalhau apply -f a.yaml --plan plan1-" in err
    assert shell("apply", "-f", "a.yaml")[0] == 0
    code, out, err = shell("plan", "-f", "a.yaml")
    assert (code, err) == (0, "")
    assert out == (
        "0 to create, 0 to change, 0 to delete, 1 unchanged; no execution starts or stops\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("plan",), id="no file"),
        pytest.param(("plan", "-f", "missing.yaml"), id="a file that is not there"),
        pytest.param(("plan", "--nonsense"), id="an unknown option"),
        pytest.param(("plan", "-f", "bad.yaml"), id="a wrong file"),
        pytest.param(("plan", "-f", "a.yaml", "-o", "xml"), id="an unknown output"),
        pytest.param(("--server", "http://127.0.0.1:1", "plan", "-f", "a.yaml"), id="no server"),
        pytest.param(("diff", "job/nobody", "--from", "1"), id="an unknown object"),
        pytest.param(("diff", "job/a"), id="no revision"),
        pytest.param(("simulate", "--without", "node/nobody"), id="an unknown node"),
        pytest.param(("simulate",), id="nothing to go without"),
    ],
)
def test_errors_of_reviews_are_never_taken_for_changes(
    shell: Shell, words: tuple[str, ...]
) -> None:
    write(MANIFEST)
    write("kind: Job\nspec: {}\n", "bad.yaml")
    code, out, err = shell(*words)
    assert code == 1, (out, err)
    assert out == ""
    assert "error: " in err


def test_a_refused_document_is_an_error_and_is_shown(shell: Shell) -> None:
    shell("apply", "-f", write(MANIFEST))
    service = MANIFEST.replace("type: batch", "type: service")
    code, out, _ = shell("plan", "-f", write(service))
    assert code == 1
    assert "! job/a is refused (a.yaml:2)" in out
    assert "cannot change from batch to service" in out


def test_apply_of_a_plan_and_its_refusal(shell: Shell, server: RunningServer) -> None:
    made = json.loads(shell("plan", "-f", write(MANIFEST), "-o", "json")[1])
    assert made["version"] == "bacalhau.org/plan-v1"
    code, out, _ = shell("apply", "--plan", made["token"])
    assert (code, out) == (0, "job/a created\n")
    changed = MANIFEST.replace("MODE: x", "MODE: y")
    token = json.loads(shell("plan", "-f", write(changed), "-o", "json")[1])["token"]
    shell("apply", "-f", write(MANIFEST.replace("MODE: x", "MODE: z"), "other.yaml"))
    code, out, err = shell("apply", "-f", "a.yaml", "--plan", token)
    assert (code, out) == (1, "")
    assert "would differ from the plan: job/a" in err
    assert "hint: look at it again: bacalhau plan" in err
    code, _, err = shell("apply", "-f", "a.yaml", "--plan", "nonsense")
    assert code == 1
    assert "is not the token of a plan" in err


def test_what_apply_takes_with_a_plan(shell: Shell) -> None:
    for words in (
        ("apply",),
        ("apply", "--any-place", "-f", "a.yaml"),
        ("apply", "--plan", "x", "--dry-run"),
        ("apply", "--plan", "x", "-m", "why"),
    ):
        code, _, err = shell(*words)
        assert code == 2, (words, err)


def test_plans_as_data_are_whole(shell: Shell, server: RunningServer) -> None:
    made = json.loads(shell("plan", "-f", write(MANIFEST), "-o", "json")[1])
    assert (
        yaml.safe_load(shell("plan", "-f", "a.yaml", "-o", "yaml")[1])["summary"]
        == (made["summary"])
    )
    # Programs may rely on every field being there.
    assert set(made["objects"][0]) >= {
        "action", "kind", "namespace", "name", "source", "line", "run", "why", "generation",
        "generationAfter", "fields", "executions", "executionsOmitted", "queued", "disconnect",
        "inputBytes", "resultsKept", "resultsRemoved", "verdicts", "warnings", "problems",
    }  # fmt: skip


def test_diff_is_the_short_form(shell: Shell) -> None:
    shell("apply", "-f", write(MANIFEST))
    assert shell("diff", "-f", "a.yaml")[:2] == (0, "")
    code, out, _ = shell("diff", "-f", write(MANIFEST.replace("MODE: x", "MODE: y")))
    assert code == 2
    assert out.splitlines() == [
        "~ job/a is changed and runs again as generation 2 (a.yaml:2)",
        "    spec.tasks[main].env.MODE: x -> y  (runs again)",
    ]


def test_the_past_on_the_command_line(shell: Shell, server: RunningServer) -> None:
    shell("apply", "-f", write(MANIFEST), "-m", "the first")
    shell("apply", "-f", write(MANIFEST.replace("MODE: x", "MODE: y")))
    out = shell("history", "job/a", "--changes")[1]
    header, *rows = out.splitlines()
    assert header.split() == ["REV", "GEN", "TIME", "WHO", "WHAT", "PHASE", "FROM", "MESSAGE"]
    assert "user:local" in rows[0]
    assert "a.yaml" in rows[0]
    assert "the first" in rows[0]
    revision, moment = rows[0].split()[0], "T".join(rows[0].split()[2:4])
    code, out, _ = shell("diff", "job/a", "--from", revision)
    assert code == 2
    assert "spec.tasks[main].env.MODE: x -> y" in out
    assert shell("diff", "job", "a", "--from", "g2", "--to", "g2")[0] == 0
    past = json.loads(shell("history", "job/a", "-o", "json")[1])[0]["time"]
    then = json.loads(shell("get", "job/a", "--at", past, "-o", "json")[1])
    assert then["spec"]["tasks"][0]["env"] == {"MODE": "x"}
    assert shell("get", "job/a", "--at", f"{moment}")[0] in (0, 5)  # whole seconds: perhaps before
    assert shell("get", "jobs", "--at", past)[0] == 2
    assert shell("get", "job/a", "--at", "yesterday")[0] == 2
    code, out, _ = shell("rollback", "job/a", "--to", "g1", "-m", "y is wrong")
    assert code == 0
    assert out.startswith("job/a rolled back to g1 (revision ")
    assert shell("rollback", "job/a", "--to", "g1")[1] == "job/a unchanged: it is as it was\n"
    assert shell("rollback", "execution/a", "--to", "1")[0] == 2
    stored = server.get(Ref("Job", "default", "a"))
    assert isinstance(stored, Job)
    assert stored.spec.task.env == {"MODE": "x"}


def test_one_job_and_one_node(shell: Shell, server: RunningServer) -> None:
    server.put(make_node("n1"), make_node("n2", cpu=50))
    shell("apply", "-f", write(MANIFEST))
    out = shell("explain", "node", "n1", "--job", "a")[1]
    assert "job a fits node n1" in out
    assert "Engine" in out
    told = shell("explain", "job/a", "--node", "n2")[1]
    assert "does not fit node n2: Cpu" in told
    assert "NO" in told
    assert "try: " in told
    assert shell("explain", "node", "n1", "--job", "nobody")[0] == 5
    assert shell("explain", "node", "n1", "--node", "n2")[0] == 1


def test_simulate_without_a_node(shell: Shell, server: RunningServer) -> None:
    server.put(make_node("n1"))
    code, out, _ = shell("simulate", "--without", "node/n1")
    assert code == 0
    assert "no execution starts or stops" in out


def test_apply_does_not_wait_for_a_retired_job(shell: Shell, server: RunningServer) -> None:
    for phase, code in ((JobPhase.COMPLETED, 0), (JobPhase.FAILED, 3)):
        shell("apply", "-f", write(MANIFEST))
        job = server.get(Ref("Job", "default", "a"))
        assert isinstance(job, Job)
        status = job.status.but(phase=phase, observed_generation=1)
        server.put(retire(job.but(status=status), datetime.now(UTC)))
        server.drop(job.ref)
        got, out, err = shell("apply", "-f", "a.yaml", "--wait", "--timeout", "20")
        assert (got, out) == (code, "job/a unchanged\n")
        assert "was retired; run it again with `bacalhau rerun a`" in err
        server.drop(Ref("RetiredJob", "default", "a"))


def test_a_namespace_from_a_file(shell: Shell, server: RunningServer) -> None:
    text = "apiVersion: bacalhau.org/v1\nkind: Namespace\nmetadata: {name: team}\n"
    file = write(text + "spec: {quota: {executions: 2, resources: {cpu: 4}}}\n", "ns.yaml")
    assert shell("apply", "-f", file, "--dry-run")[1] == "namespace/team created (dry run)\n"
    assert shell("apply", "-f", file)[1] == "namespace/team created\n"
    assert shell("apply", "-f", file)[1] == "namespace/team unchanged\n"
    assert shell("get", "namespaces")[1].splitlines()[1].split()[:3] == ["team", "2", "4"]
    assert "0 of 2 executions in use" in shell("explain", "ns/team")[1]
    assert shell("delete", "ns", "team")[1] == "namespace/team deleted\n"


def test_where_a_file_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    (clone / "jobs").mkdir(parents=True)
    file = clone / "jobs" / "a.yaml"
    file.write_text("x")
    assert origin_of(str(file)).commit == ""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(clone), *words], check=True, capture_output=True)
    head = subprocess.run(
        ["git", "-C", str(clone), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    other = clone / "jobs" / "b.yaml"
    other.write_text("y")
    from bacalhau.cli import origin

    origin._clone.cache_clear()
    told = origin_of(str(file), "why")
    assert (told.source, told.commit) == ("jobs/a.yaml", head.stdout.strip())
    assert told.message == "why"
    assert "@" in told.by
    assert origin_of(str(other)).commit.endswith("-dirty")
    assert origin_of("<stdin>").source == "<stdin>"
