"""IPFS nodes for tests, as processes; see `ipfs_node`."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass
class IpfsNode:
    """A node that runs. `url` is the address of its API, and of its gateway."""

    url: str
    peer: str
    swarm: int

    def call(self, command: str) -> Any:
        """One RPC call without a body."""
        request = urllib.request.Request(f"{self.url}/api/v0/{command}", data=b"", method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")

    def connect(self, other: "IpfsNode") -> None:
        """Know another node."""
        self.call(f"swarm/connect?arg=/ip4/127.0.0.1/tcp/{other.swarm}/p2p/{other.peer}")


@contextlib.contextmanager
def ipfs_node(repo: Path) -> Iterator[IpfsNode]:
    """A node for the duration of the block."""
    repo.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        swarm = probe.getsockname()[1]
    with (repo / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ipfs_node", str(repo), "0", str(swarm)],
            cwd=repo,  # Kubo leaves a log of its own there
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        words = b""
        while not words.startswith(b"ready"):
            words = process.stdout.readline()
            assert words, (repo / "log").read_text()[-3000:]
        _, port, peer = words.decode().split()
        yield IpfsNode(f"http://127.0.0.1:{port}", peer, swarm)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
