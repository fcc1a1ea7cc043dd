"""The processes: an orchestrator that watches one repository, an agent, and `gitops run` next to
the other; each can be killed, stopped for a while and started again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from bacalhau.client.sync import Client
from bacalhau_api.v1.source import Source
from tests.e2e.cluster import BACALHAU, Cluster, ClusterError, environment, nats_pid
from tests.support.repo import Repo

PUSHED, DESK = "pushed", "desk"
HOOK = Path(__file__).parents[3] / "manifests" / "gitops" / "hooks" / "pre-receive"
NAMESPACE = """\
apiVersion: bacalhau.org/v1
kind: Namespace
metadata: {name: default}
spec: {retention: {finishedSeconds: 20}}
"""


class Runner:
    """`bacalhau gitops run`, next to a directory."""

    def __init__(self, root: Path, directory: Path) -> None:
        self.log = root / "runner.log"
        self._directory = directory
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self, server: str) -> None:
        """Start it; it finds its way by itself."""
        words = ("gitops", "run", str(self._directory), "--name", DESK, "--view", "files")
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*BACALHAU, *words, "--settle", "0.3", "--sweep", "5", "--max-prune", "34"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment(), "BACALHAU_SERVER": server},
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.popen is not None and self.popen.poll() is None

    def kill(self) -> None:
        """kill -9."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait(10)

    def tail(self) -> str:
        """The end of what it said."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Fleet:
    """Everything that runs. `pushed` is the bare repository, `desk` the watched work tree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        command = self.bin / "bacalhau"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m bacalhau "$@"\n')
        command.chmod(0o755)
        self.pushed = Repo(root / "pushed.git", bare=True)
        self.cluster = Cluster(root / "cluster")
        self.runner = Runner(root, root / "desk")

    def start(self) -> None:
        """All of it."""
        options = ["--gitops", f"{PUSHED}={self.pushed.root}", "--on-exit", "keep"]
        self.cluster.orchestrator.args += options
        self.cluster.start(["edge-1"], args=["--on-exit", "stop"])
        self.cluster.orchestrator.args += options
        (self.root / "default.yaml").write_text(NAMESPACE)
        self.cluster.run("apply", "-f", str(self.root / "default.yaml"))
        self.cluster.run("gitops", "set", PUSHED, "--max-prune", "34")
        self.runner.start(self.cluster.server)

    def client(self) -> Client:
        """To the API."""
        return Client(self.cluster.server)

    def source(self, name: str) -> Source:
        """As stored. Raises UnavailableError while the orchestrator starts."""
        with self.client() as client:
            return client.get(Source, name, "")

    def hook(self, *, is_on: bool) -> None:
        """The hook of the bare repository that refuses what cannot be read."""
        place = self.pushed.root / "hooks" / "pre-receive"
        place.unlink(missing_ok=True)
        if is_on:
            shutil.copy(HOOK, place)
            place.chmod(0o755)

    # -- what happens to processes ---------------------------------------------------------------

    def kill_orchestrator(self) -> None:
        """kill -9, and again."""
        self.cluster.orchestrator.kill()
        self.cluster.orchestrator.start()

    def kill_nats(self) -> None:
        """kill -9; its parent starts it again."""
        with contextlib.suppress(ClusterError, ProcessLookupError):
            os.kill(nats_pid(self.cluster.orchestrator.data_dir), signal.SIGKILL)

    def restart_orchestrator(self) -> None:
        """In good order."""
        self.cluster.orchestrator.stop()
        self.cluster.orchestrator.start()

    def kill_runner(self) -> None:
        """kill -9, and again."""
        self.runner.kill()
        self.runner.start(self.cluster.server)

    def kill_agent(self) -> None:
        """kill -9, and again."""
        agent = self.cluster.agents["edge-1"]
        agent.kill()
        agent.start()

    def kill_all(self) -> None:
        """kill -9 of everything at once."""
        agent = self.cluster.agents["edge-1"]
        for process in (self.cluster.orchestrator, agent):
            assert process.popen is not None
            process.popen.kill()
        self.runner.kill()
        self.kill_orchestrator()
        self.kill_agent()
        self.runner.start(self.cluster.server)

    def freeze_runner(self, seconds: float) -> None:
        """SIGSTOP, and on: what it knows is old by then."""
        if self.runner.is_running:
            assert self.runner.popen is not None
            os.kill(self.runner.popen.pid, signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(self.runner.popen.pid, signal.SIGCONT)

    def revive(self) -> None:
        """Whatever has ended by itself runs again."""
        if not self.runner.is_running:
            self.runner.start(self.cluster.server)

    def close(self) -> list[str]:
        """Stop everything; what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            if self.runner.is_running:
                assert self.runner.popen is not None
                self.runner.popen.terminate()
                try:
                    self.runner.popen.wait(20)
                except subprocess.TimeoutExpired:
                    self.runner.kill()
        return self.cluster.close()
