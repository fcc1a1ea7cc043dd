"""A real registry for tests: Debian's `docker-registry`, beside a test's Docker Engine.

It listens on loopback in the engine's network namespace, which the engine takes for trustworthy
without TLS. With a password, pulls need credentials.
"""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.dockerd import Dockerd, DockerdError

START_SECONDS = 30.0
USER, PASSWORD = "worker", "s3cret-word"


@dataclass
class Registry:
    """One registry. `config_dir` holds a Docker config.json with its password, if it has one."""

    dockerd: Dockerd
    root: Path
    port: int
    has_password: bool = False
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    @property
    def config_dir(self) -> Path:
        """For DOCKER_CONFIG."""
        return self.root / "docker"

    def start(self) -> None:
        """Start, and wait until it listens."""
        if shutil.which("docker-registry") is None:
            raise DockerdError("this test needs: apt-get install docker-registry")
        self.root.mkdir(parents=True, exist_ok=True)
        self.config_dir.mkdir(exist_ok=True)
        config = [
            "version: 0.1",
            "log: {level: error}",
            f"storage: {{filesystem: {{rootdirectory: {self.root}/data}}, delete: {{enabled: true}}}}",
            f"http: {{addr: '{self.address}'}}",
        ]
        auths = {}
        if self.has_password:
            done = subprocess.run(
                ["htpasswd", "-Bbn", USER, PASSWORD], check=True, capture_output=True, text=True
            )
            (self.root / "htpasswd").write_text(done.stdout)
            config.append(f"auth: {{htpasswd: {{realm: test, path: {self.root}/htpasswd}}}}")
            word = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            auths = {self.address: {"auth": word}}
        (self.config_dir / "config.json").write_text(json.dumps({"auths": auths}))
        (self.root / "config.yml").write_text("\n".join(config) + "\n")
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.dockerd.inside, "docker-registry", "serve", str(self.root / "config.yml")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        probe = [*self.dockerd.inside, "busybox", "nc", "127.0.0.1", str(self.port)]
        while subprocess.run(probe, check=False, input=b"", capture_output=True).returncode:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise DockerdError(
                    f"the registry does not start: {(self.root / 'log').read_text()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; its data stays for another start."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def push(self, archive_tag: str, repository: str, tag: str) -> str:
        """Push an image the engine has, and remove it there; its reference by digest."""
        name = f"{self.address}/{repository}"
        auth = {"username": USER, "password": PASSWORD} if self.has_password else None
        with self.dockerd.api() as api:
            api.tag(archive_tag, name, tag)
            digest = ""
            for line in api.push(name, tag, stream=True, decode=True, auth_config=auth):
                assert "error" not in line, line
                digest = (line.get("aux") or {}).get("Digest", digest)
            api.remove_image(f"{name}:{tag}")
        assert digest
        return f"{name}@{digest}"


@contextlib.contextmanager
def running_registry(
    dockerd: Dockerd, root: Path, port: int, *, has_password: bool = False
) -> Iterator[Registry]:
    """A registry, stopped at the end. The port is one of the engine's own namespace."""
    registry = Registry(dockerd, root, port, has_password)
    try:
        registry.start()
        yield registry
    finally:
        registry.stop()
