"""A fleet run from git: real processes, a real repository with a hook, and kill -9."""

import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau.client.sync import Client
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.source import Source, SourceStatus
from tests.e2e.cluster import Cluster, environment
from tests.support.repo import Repo

MANIFESTS = Path(__file__).parents[2] / "manifests" / "gitops"
ROUNDS = 5


def manifest(name: str, code: int = 0) -> str:
    return (
        f"apiVersion: bacalhau.org/v1\nkind: Job\nmetadata: {{name: {name}}}\n"
        "spec:\n  type: batch\n  retry: {attempts: 1}\n  tasks:\n"
        f"    - {{name: main, engine: {{type: noop, params: {{exitCode: {code}}}}}}}\n"
    )


class Fleet:
    """A bare repository that an orchestrator watches, a clone of it, and the orchestrator."""

    def __init__(self, root: Path) -> None:
        self.origin = Repo(root / "fleet.git", bare=True)
        self.work = Repo(root / "work")
        self.work.git("remote", "add", "origin", str(self.origin.root))
        self.cluster = Cluster(root / "cluster")
        self.options = ["--gitops", f"prod={self.origin.root}"]

    def push(self) -> str:
        """Commit everything, and push."""
        commit = self.work.commit()
        self.work.git("push", "-q", "--force", "origin", "HEAD:main")
        return commit

    def restart(self) -> None:
        """The orchestrator, again."""
        process = self.cluster.orchestrator
        process.args = [a for a in process.args if a not in self.options] + self.options
        process.start()

    def client(self) -> Client:
        return Client(self.cluster.server)

    def status(self) -> SourceStatus:
        with self.client() as client:
            return client.get(Source, "prod", "").status

    def jobs(self) -> dict[str, Job]:
        with self.client() as client:
            return {job.name: job for job in client.list(Job) if not job.is_deleting}

    def eventually(self, check: Callable[[], Any], what: str) -> Any:
        import time

        from bacalhau_api.errors import BacalhauError

        end = time.monotonic() + 60
        while True:
            try:
                if found := check():
                    return found
            except BacalhauError:  # it may be about to start
                pass
            if time.monotonic() > end:
                raise AssertionError(f"{what} did not happen\n{self.cluster.orchestrator.tail()}")
            time.sleep(0.1)

    def applied(self, commit: str) -> SourceStatus:
        """Wait until a commit was applied whole."""

        def is_there() -> SourceStatus | None:
            status = self.status()
            return status if status.revision_applied == commit else None

        found: SourceStatus = self.eventually(is_there, f"applying {commit}")
        return found


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path)
    made.cluster.orchestrator.args += made.options
    yield made
    assert made.cluster.close() == []


def test_a_fleet_from_git_through_kills(fleet: Fleet) -> None:
    shutil.copytree(MANIFESTS / "fleet", fleet.work.root, dirs_exist_ok=True)
    first = fleet.push()
    fleet.cluster.start(["edge-1"], args=["--on-exit", "stop"])
    status = fleet.applied(first)
    assert (status.counts.objects, status.problems) == (4, ())
    assert sorted(fleet.jobs()) == ["hello", "report", "sort"]

    def are_complete() -> bool:
        return {job.status.phase for job in fleet.jobs().values()} == {"Completed"}

    fleet.eventually(are_complete, "running the jobs")
    with fleet.client() as client:
        ran = {e.metadata.uid for e in client.list(Execution)}
        entries = client.history(Job, "hello")
    assert entries[0].actor == "source/prod"
    assert first[:12] in entries[0].message

    rng = random.Random(7)
    for turn in range(ROUNDS):  # killed at any moment of applying a push
        for i in range(8):
            fleet.work.put(f"jobs/r{i}.yaml", manifest(f"r{i}", turn if i % 2 else 0))
        if turn % 2:
            (fleet.work.root / f"jobs/r{turn}.yaml").unlink()
        fleet.push()
        with_delay = fleet.cluster.orchestrator
        try:
            assert with_delay.popen is not None
            with_delay.popen.wait(rng.uniform(0.0, 0.5))
        except subprocess.TimeoutExpired:
            pass
        with_delay.kill()
        fleet.restart()
    for i in range(8):
        fleet.work.put(f"jobs/r{i}.yaml", manifest(f"r{i}"))
    last = fleet.push()
    fleet.applied(last)
    names = {"hello", "sort", "report", *(f"r{i}" for i in range(8))}
    assert set(fleet.jobs()) == names
    with fleet.client() as client:  # what had run was not started again by all this
        kept = {e.metadata.uid for e in client.list(Execution) if e.spec.job in ("hello", "sort")}
    assert kept <= ran

    (fleet.work.root / "jobs/hello.yaml").unlink()
    fleet.applied(fleet.push())
    fleet.eventually(lambda: set(fleet.jobs()) == names - {"hello"}, "pruning hello")


def test_a_hook_refuses_what_cannot_be_read(fleet: Fleet, tmp_path: Path) -> None:
    """And what comes around the hook freezes deletions, until it is mended."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    command = bin_dir / "bacalhau"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bacalhau "$@"\n')
    hook = fleet.origin.root / "hooks" / "pre-receive"
    shutil.copy(MANIFESTS / "hooks" / "pre-receive", hook)
    for script in (command, hook):
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    old = os.environ["PATH"]
    os.environ["PATH"] = f"{bin_dir}{os.pathsep}{old}"
    try:
        fleet.work.write(a=manifest("a"), b=manifest("b"), c=manifest("c"))
        good = fleet.push()
        fleet.cluster.start()
        fleet.applied(good)
        (fleet.work.root / "b.yaml").unlink()
        fleet.work.write(a=manifest("a").replace("batch", "bitch"))
        with pytest.raises(subprocess.CalledProcessError) as refused:
            fleet.push()
        assert "a.yaml:5" in refused.value.stderr
        assert fleet.origin.git("rev-parse", "main") == good
        hook.unlink()
        bad = fleet.push()
        fleet.eventually(lambda: fleet.status().revision_seen == bad, "seeing the commit")
        status = fleet.status()
        assert (status.phase, status.freeze and status.freeze.reason) == ("Frozen", "Broken")
        assert (status.problems[0].file, status.problems[0].line) == ("a.yaml", 5)
        assert sorted(fleet.jobs()) == ["a", "b", "c"]
        done = fleet.cluster.run("gitops", "status", "prod", check=False)
        assert done.returncode == 1
        assert "a.yaml:5" in done.stdout
        fleet.work.write(a=manifest("a"))
        fleet.applied(fleet.push())
        fleet.eventually(lambda: sorted(fleet.jobs()) == ["a", "c"], "pruning b")
    finally:
        os.environ["PATH"] = old
    assert environment()["PATH"] == old
