"""A watched directory: how long until it is applied, and what it costs while nothing happens.

    python bench/gitops.py [--files 5000] [--idle 30]

A real orchestrator with its embedded, durable store watches a git repository. Measured:

- first     everything is new: commit to applied ÷ parsing the same files with one call each
- change    one file of all is changed: commit to applied
- prune     one file of all is removed: commit to applied
- restart   start of the process to the first look at an unchanged directory
- idle      processor time of the orchestrator, beside that of one which has the same jobs and
            watches nothing
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bacalhau.client.sync import Client
from bacalhau_api.errors import BacalhauError
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.v1.source import Source, SourceStatus
from tests.e2e.cluster import Cluster
from tests.support.gitops import manifest
from tests.support.repo import Repo


def status_of(cluster: Cluster) -> SourceStatus:
    """What the source tells; nothing yet while the server starts."""
    try:
        with Client(cluster.server) as client:
            return client.get(Source, "fleet", "").status
    except BacalhauError:
        return SourceStatus()


def until(check: Callable[[], bool], limit_seconds: float = 600) -> float:
    """Seconds until `check` holds."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > limit_seconds:
            raise TimeoutError("it did not happen")
        time.sleep(0.02)
    return time.monotonic() - began


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def idle(cluster: Cluster, seconds: float) -> float:
    """Processor time of the orchestrator, in so many seconds."""
    assert cluster.orchestrator.popen is not None
    pid = cluster.orchestrator.popen.pid
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return cpu_seconds(pid) - before


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--idle", type=float, default=30.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        repo = Repo(root / "fleet")
        # Services that nothing can run: what is measured is the directory, not the jobs.
        texts = {f"{i % 50}/j{i}.yaml": manifest(f"j{i}") for i in range(options.files)}
        for path, text in texts.items():
            repo.put(path, text)
        began = time.monotonic()
        for path, text in texts.items():
            parse_manifests(text, source=path)
        parsing = time.monotonic() - began
        cluster = Cluster(root / "cluster")
        cluster.start()
        cluster.orchestrator.stop()
        plain = list(cluster.orchestrator.args)
        cluster.orchestrator.args += ["--gitops", str(repo.root)]
        cluster.orchestrator.start()

        def applied(commit: str) -> float:
            return until(lambda: status_of(cluster).revision_applied == commit)

        try:
            first = applied(repo.commit())
            print(f"files {options.files}; parsing alone {parsing:.2f} s")
            print(f"first    {first:6.2f} s   {first / parsing:5.2f} of parsing")
            repo.put("0/j0.yaml", manifest("j0", "two"))
            print(f"change   {applied(repo.commit()):6.2f} s")
            (repo.root / "1/j1.yaml").unlink()
            print(f"prune    {applied(repo.commit()):6.2f} s")
            time.sleep(options.idle)  # until the job reconciler, too, has looked at everything
            watching = idle(cluster, options.idle)
            cluster.orchestrator.stop()
            began = time.monotonic()
            cluster.orchestrator.start()
            repo.put("2/j2.yaml", manifest("j2", "two"))
            applied(repo.commit())
            print(f"restart  {time.monotonic() - began:6.2f} s until a change is applied")
            cluster.orchestrator.stop()
            cluster.orchestrator.args = plain
            cluster.orchestrator.start()
            time.sleep(options.idle)  # after a start everything is looked at once
            without = idle(cluster, options.idle)
            print(
                f"idle     {watching:6.2f} s in {options.idle:g} s; the same jobs without the "
                f"directory {without:.2f} s"
            )
        finally:
            cluster.close()


if __name__ == "__main__":
    main()
