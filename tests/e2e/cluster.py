"""Real processes of a small fleet: an orchestrator with its embedded NATS server, and agents.

Everything is started as a user would start it, by the `bacalhau` command, and talks over loopback.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 30.0
BACALHAU = (sys.executable, "-m", "bacalhau")


def environment() -> dict[str, str]:
    """What the processes get. Like those of users, they may keep compiled modules: without them
    each start compiles the whole program anew."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


class ClusterError(Exception):
    """A process did not do what was asked of it; the message holds the end of its log."""


@dataclass
class Process:
    """One `bacalhau serve`, which can be killed and started again on the same data."""

    name: str
    data_dir: Path
    args: list[str]
    wrap: tuple[str, ...] = ()
    """Words before the command, such as those that put it into a network namespace."""
    popen: subprocess.Popen[bytes] | None = None
    address: dict[str, str] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """Where its standard output and error go."""
        return self.data_dir.parent / f"{self.name}.log"

    def launch(self) -> None:
        """Start, without waiting."""
        (self.data_dir / "serve.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*self.wrap, *BACALHAU, "serve", "--data-dir", str(self.data_dir), *self.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    def start(self) -> None:
        """Start, and wait until it says that it is ready."""
        self.launch()
        assert self.popen is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.popen.poll() is not None:
                raise ClusterError(f"{self.name} ended at start:\n{self.tail()}")
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                self.address = json.loads((self.data_dir / "serve.json").read_text())
                return
            time.sleep(0.02)
        raise ClusterError(f"{self.name} was not ready in {START_SECONDS} s:\n{self.tail()}")

    def kill(self) -> None:
        """kill -9 of this one process; its children are left to themselves."""
        assert self.popen is not None
        self.popen.kill()
        self.popen.wait(10)

    def stop(self) -> int:
        """SIGTERM, and wait for the clean end; the exit code."""
        assert self.popen is not None
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(20)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise ClusterError(f"{self.name} did not stop:\n{self.tail()}") from None

    def tail(self, size: int = 6000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-size:] if self.log.exists() else ""


class Cluster:
    """An orchestrator and some agents under one directory. `wrap` are words before every command,
    such as those that put it into a network namespace."""

    def __init__(self, root: Path, *, wrap: tuple[str, ...] = ()) -> None:
        self.root = root
        self.wrap = wrap
        self.orchestrator = Process(
            "orchestrator",
            root / "orchestrator",
            ["--role", "orchestrator", "--port", "0", "--nats-port", "-1"],
            wrap,
        )
        self.agents: dict[str, Process] = {}

    @property
    def server(self) -> str:
        """The API's URL."""
        return self.orchestrator.address["api"]

    def start(self, agents: Sequence[str] = (), *, args: Sequence[str] = ()) -> None:
        """Start the orchestrator, then the agents."""
        self.orchestrator.data_dir.mkdir(parents=True, exist_ok=True)
        self.orchestrator.start()
        # From here on the same addresses, also after a restart.
        api, nats = self.server.rsplit(":", 1)[1], self.orchestrator.address["nats"]
        self.orchestrator.args = [
            "--role", "orchestrator", "--port", api, "--nats-port", nats.rsplit(":", 1)[1],
        ]  # fmt: skip
        for name in agents:
            self.add_agent(name, args=args)

    def add_agent(
        self, name: str, *, args: Sequence[str] = (), wrap: tuple[str, ...] = ()
    ) -> Process:
        """Enrol and start one agent. `wrap` are more words before its command."""
        token = self.run("node", "token").stdout.strip().splitlines()[-1]
        data_dir = self.root / name
        data_dir.mkdir(parents=True, exist_ok=True)
        agent = Process(
            name,
            data_dir,
            ["--role", "compute", "--orchestrator", self.server, "--token", token,
             "--name", name, *args],
            (*self.wrap, *wrap),
        )  # fmt: skip
        agent.start()
        self.agents[name] = agent
        self.until_heard(name)
        return agent

    def until_heard(self, name: str) -> None:
        """Wait until the orchestrator hears a node. An agent is ready as soon as it has taken up
        its work; only from now on more is placed on it."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            nodes = json.loads(self.run("get", "nodes", "-o", "json").stdout)["items"]
            contacts = {n["metadata"]["name"]: n["status"].get("contact") for n in nodes}
            if contacts.get(name) == "Reachable":
                return
            if time.monotonic() > deadline:
                raise ClusterError(f"{name} is not heard: {contacts}\n{self.agents[name].tail()}")
            time.sleep(0.1)

    def run(
        self, *args: str, check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """One `bacalhau` command against this cluster."""
        done = subprocess.run(
            [*self.wrap, *BACALHAU, *args],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment(), "BACALHAU_SERVER": self.server},
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"bacalhau {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}\n"
                f"{self.orchestrator.tail()}"
            )
        return done

    def close(self) -> list[str]:
        """Stop everything; what is still running of it afterwards (nothing, one hopes)."""
        for process in (*self.agents.values(), self.orchestrator):
            if process.popen is not None and process.popen.poll() is None:
                process.stop()
        return left_over(self.root)


def left_over(root: Path, *, seconds: float = 5.0) -> list[str]:
    """Command lines of live processes that mention `root`, after a moment's patience."""
    deadline = time.monotonic() + seconds
    while True:
        found = [line for pid, line in _processes() if str(root) in line and pid != os.getpid()]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def nats_pid(root: Path) -> int:
    """The process id of the NATS server that keeps its data under `root`."""
    for pid, line in _processes():
        if "nats-server" in line.split("\0")[0] and str(root) in line:
            return pid
    raise ClusterError(f"no nats-server runs under {root}")


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                if line:
                    yield int(entry.name), line


async def eventually(check, seconds: float = 30.0, what: str = "it"):  # type: ignore[no-untyped-def]
    """Wait until `check()` gives something true; return that."""
    deadline = time.monotonic() + seconds
    while True:
        found = await asyncio.to_thread(check)
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen in {seconds} s")
        await asyncio.sleep(0.05)
