"""Work in containers: a Docker Engine for each node, which can be killed and stopped like everything
else. What is left on an engine in the end is an orphan.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import docker.errors
import requests

from bacalhau.engines.docker.body import LABEL_RUN
from bacalhau_api.v1.job import Resources, SpecConfig, Task
from tests.support.dockerd import BUSYBOX, Dockerd, busybox_image, check_tools

KEEPS = {"live-restore": True}
"""An engine that leaves its containers alone when it dies."""

_ASK_SECONDS = 20
_COUNT = "i=0; while [ $i -lt {ticks} ]; do echo tick $i; i=$((i + 1)); {pause}; done"
_PAUSE = "[ $((i % 4)) != 0 ] || sleep 0.2"
"""A process for each fourth tick: twenty a second of each container would be the whole load."""


class DockerProgram:
    """A shell script in busybox."""

    name = "docker"

    def __init__(self) -> None:
        self.engines: dict[str, Dockerd] = {}

    def task(self, ticks: int) -> Task:
        """See Program."""
        script = _COUNT.format(ticks=ticks, pause=_PAUSE)
        params = {"image": BUSYBOX, "entrypoint": ["/bin/sh", "-c"], "parameters": [script]}
        return Task(
            engine=SpecConfig(type="docker", params=params),
            publisher=SpecConfig(type="local"),
            resources=Resources(cpu_millis=100, memory_bytes=32 << 20),
        )

    def begin(self, nodes: Iterable[str]) -> None:
        """See Program."""
        check_tools()
        image = busybox_image(BUSYBOX)
        for node in nodes:
            # Not below the fleet's directory, whose name is too long for sockets.
            root = Path(tempfile.mkdtemp(prefix="br-", dir="/tmp"))
            engine = self.engines[node] = Dockerd(root, KEEPS)
            engine.start()
            engine.load(image)

    def options(self, node: str) -> list[str]:
        """See Program."""
        return ["--docker-host", self.engines[node].host]

    def running(self, node: str, data_dir: Path) -> set[str]:
        """See Program: every container, in whatever state, for one that ended is removed."""
        try:
            with self.engines[node].api(_ASK_SECONDS) as api:
                found = api.containers(all=True)
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            return {f"the engine does not answer: {error}"[:200]}
        return {str((one.get("Labels") or {}).get(LABEL_RUN, one["Id"])) for one in found}

    def pids(self, node: str) -> list[int]:
        """See Program: the engine with its parts, and all containers."""
        return self.engines[node].pids()

    def heal(self) -> None:
        """See Program."""
        for engine in self.engines.values():
            engine.config = KEEPS
            if engine.is_up:
                engine.resume()
            else:
                engine.start()

    def testimony(self) -> dict[str, str]:
        """See Program."""
        found = {}
        for node, engine in self.engines.items():
            with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
                with engine.api(_ASK_SECONDS) as api:
                    all_of_them = [api.inspect_container(c["Id"]) for c in api.containers(all=True)]
                    logs = [api.logs(c["Id"])[-400:].decode() for c in all_of_them]
                found[f"containers-{node}.json"] = json.dumps([all_of_them, logs], indent=1)
            found[f"dockerd-{node}.log"] = (engine.root / "log").read_text(errors="replace")
        return found

    def leftovers(self) -> list[str]:
        """See Program."""
        found = []
        for node, engine in self.engines.items():
            with engine.api(_ASK_SECONDS) as api:
                found += [f"{one['Names']} runs on {node}" for one in api.containers()]
                names = [one["Name"] for one in api.networks()]
            found += [f"network {name} is on {node}" for name in names if "bacalhau" in name]
        return found

    def end(self) -> None:
        """See Program."""
        for engine in self.engines.values():
            with contextlib.suppress(OSError):
                engine.stop()
            shutil.rmtree(engine.root, ignore_errors=True)
        self.engines.clear()
