"""A real Docker Engine for tests, apart from any other on the machine.

It has its own data root, exec root, containerd, cgroup parent and network namespace, so that its
bridges and firewall rules are seen by nobody else, and all of it is gone when it is stopped. Needs
root, and the Debian packages docker.io, busybox-static, iproute2 and iptables; they are installed by
`.ci/run`. Images are built here, from the machine's static busybox, without a registry.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

START_SECONDS = 60.0
STOP_SECONDS = 30.0
BUSYBOX = "test/busybox:1"
_NEEDED = {
    "dockerd": "docker.io",
    "containerd": "docker.io",
    "busybox": "busybox-static",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "iptables": "iptables",
}


class DockerdError(Exception):
    """The engine cannot be had; the message says what to do."""


@dataclass
class Dockerd:
    """One engine. `root` is a short path of its own: sockets have at most about 100 characters."""

    root: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    wrap: tuple[str, ...] = ()
    """Words before the command, such as those that give it mounts of its own."""
    _process: "subprocess.Popen[bytes] | None" = None

    @property
    def socket(self) -> Path:
        """Where the engine listens."""
        return self.root / "docker.sock"

    @property
    def host(self) -> str:
        """Its address."""
        return f"unix://{self.socket}"

    @property
    def name(self) -> str:
        """Of its network namespace and cgroup."""
        return "bt-" + hashlib.sha256(str(self.root).encode()).hexdigest()[:8]

    @property
    def inside(self) -> tuple[str, ...]:
        """A command's prefix that runs it in the engine's network namespace."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    @property
    def log(self) -> str:
        """The end of what the engine said."""
        path = self.root / "log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    @property
    def is_up(self) -> bool:
        """Whether it was started and lives, stopped in its tracks or not."""
        return self._process is not None and self._process.poll() is None

    def pids(self) -> list[int]:
        """Processes that are the engine's: named by its directory, or in its cgroups."""
        own = {self._process.pid} if self.is_up and self._process is not None else set()
        return sorted(own.union(self._left()))

    def start(self) -> None:
        """Start, and wait until it answers."""
        check_tools()
        self.root.mkdir(parents=True, exist_ok=True)
        if not Path(f"/run/netns/{self.name}").exists():
            _run("ip", "netns", "add", self.name)
            _run("ip", "-n", self.name, "link", "set", "lo", "up")
        (self.root / "daemon.json").write_text(json.dumps(dict(self.config)))
        (self.root / "pid").unlink(missing_ok=True)
        with (self.root / "log").open("ab") as log:
            # nsenter, not `ip netns exec`: that would mount /sys anew and hide the cgroups.
            self._process = subprocess.Popen(
                [
                    *self.inside, *self.wrap, "dockerd", "--config-file", str(self.root / "daemon.json"),
                    "--host", self.host, "--data-root", str(self.root / "data"),
                    "--exec-root", str(self.root / "exec"), "--pidfile", str(self.root / "pid"),
                    "--cgroup-parent", f"/{self.name}",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise DockerdError(f"dockerd ended at start:\n{self.log}")
            with contextlib.suppress(docker.errors.DockerException):  # it listens, and is not ready
                if self._listens():
                    with self.api() as api:
                        api.ping()
                    return
            time.sleep(0.05)
        raise DockerdError(f"dockerd was not ready in {START_SECONDS} s:\n{self.log}")

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
            return True

    def kill(self) -> None:
        """kill -9 of the engine. Its containerd goes with it; shims and containers are left to
        themselves."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_SECONDS)
        # A containerd that died and was not reaped would be taken for alive by the next engine.
        (self.root / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def end(self) -> None:
        """SIGTERM, and wait: an orderly end, which takes the containers along."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(STOP_SECONDS)

    def pause(self) -> None:
        """Stop it in its tracks: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The opposite."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it and everything of it, and take its mounts, namespace and cgroups away."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(STOP_SECONDS)
        deadline = time.monotonic() + STOP_SECONDS
        while pids := self._left():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise DockerdError(f"processes of {self.root} do not end: {pids}")
            time.sleep(0.05)
        for mount in reversed(self._mounts()):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        if Path(f"/run/netns/{self.name}").exists():
            _run("ip", "netns", "del", self.name)
        for parent in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")):
            for top, _, _ in os.walk(parent / self.name, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(top)
        shutil.rmtree(self.root, ignore_errors=True)

    @contextlib.contextmanager
    def api(self, seconds: int = 30) -> Iterator[docker.APIClient]:
        """A client of its own, to look behind the product's back."""
        client = docker.APIClient(base_url=self.host, version="auto", timeout=seconds)
        try:
            yield client
        finally:
            client.close()

    def load(self, archive: bytes) -> None:
        """Take in an image archive."""
        with self.api() as api:
            for answer in api.load_image(archive):  # type: ignore[no-untyped-call]
                assert "error" not in answer, answer

    def _left(self) -> list[int]:
        """Processes that are the engine's: named by its directory, or in its cgroups."""
        found = set()
        mark = str(self.root / "exec").encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if mark in (entry / "cmdline").read_bytes():
                        found.add(int(entry.name))
        for pattern in (f"{self.name}/**/cgroup.procs", f"*/{self.name}/**/cgroup.procs"):
            for path in Path("/sys/fs/cgroup").glob(pattern):
                with contextlib.suppress(OSError):
                    found.update(int(pid) for pid in path.read_text().split())
        return sorted(found)

    def _mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        points = [line.split()[1] for line in lines]
        return [point for point in points if point.startswith(str(self.root))]


def check_tools() -> None:
    """Raises DockerdError with instructions if something is not installed."""
    if os.geteuid() != 0:
        raise DockerdError("tests of the docker engine start one of their own, which needs root")
    missing = sorted({package for tool, package in _NEEDED.items() if shutil.which(tool) is None})
    if missing:
        raise DockerdError(
            f"tests of the docker engine need: apt-get install --no-install-recommends "
            f"{' '.join(missing)}"
        )


@contextlib.contextmanager
def running_dockerd(*wrap: str, **config: Any) -> Iterator[Dockerd]:
    """An engine with the busybox image, stopped at the end."""
    # Not in pytest's directories, whose names are too long for sockets.
    engine = Dockerd(Path(tempfile.mkdtemp(prefix="bd-", dir="/tmp")), config, wrap)
    try:
        engine.start()
        engine.load(busybox_image(BUSYBOX))
        yield engine
    finally:
        engine.stop()


def busybox_image(tag: str, *, files: Mapping[str, bytes] | None = None, **config: Any) -> bytes:
    """A `docker load` archive of one image: busybox with its commands, and some files more.
    `config` goes into the image's configuration (User, Env, Entrypoint, Cmd, WorkingDir...).
    The same arguments make the same bytes."""
    layer = _busybox_layer(files or {})
    digest = hashlib.sha256(layer).hexdigest()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    defaults = {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/"}
    image = json.dumps(
        {
            "architecture": machine,
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": defaults | config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
            "history": [{"created": "1970-01-01T00:00:00Z"}],
        },
        sort_keys=True,
    ).encode()
    name = hashlib.sha256(image).hexdigest() + ".json"
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": [f"{digest}/layer.tar"]}]
    return _tar(
        {
            f"{digest}/layer.tar": (0o644, layer),
            name: (0o644, image),
            "manifest.json": (0o644, json.dumps(manifest).encode()),
        }
    )


def _busybox_layer(files: Mapping[str, bytes]) -> bytes:
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    data = busybox.read_bytes()
    if b"ld-linux" in data[:4096]:
        raise DockerdError("busybox is not static: apt-get install busybox-static")
    done = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    entries: dict[str, tuple[int, bytes | str | None]] = {
        name: (0o755, None) for name in ("bin", "dev", "etc", "inputs", "outputs", "proc", "sys")
    }
    entries["tmp"] = (0o1777, None)
    entries["bin/busybox"] = (0o755, data)
    for applet in done.stdout.split():
        if applet != "busybox":
            entries[f"bin/{applet}"] = (0o777, "busybox")
    users = b"root:x:0:0:root:/root:/bin/sh\nworker:x:1234:1235:worker:/tmp:/bin/sh\n"
    entries["etc/passwd"] = (0o644, users)
    entries["etc/group"] = (0o644, b"root:x:0:\nworkers:x:1235:\n")
    entries |= {path: (0o755, content) for path, content in files.items()}
    return _tar(entries)


def _tar(entries: Mapping[str, tuple[int, bytes | str | None]]) -> bytes:
    """Sorted, owned by root, of no age: files (bytes), links (str) and directories (None)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(entries):
            mode, content = entries[name]
            info = tarfile.TarInfo(name)
            info.mode = mode
            if content is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise DockerdError(f"{' '.join(command)}: {done.stderr.strip()}")


def containers(engine: Dockerd) -> Sequence[dict[str, Any]]:
    """All containers of an engine."""
    with engine.api() as api:
        found: list[dict[str, Any]] = api.containers(all=True)
    return found
