"""Network namespaces on one machine: a switch, and a cable to each party that can be damaged.

Everything lives in namespaces of the command itself (network, mounts, process ids), so that nothing
is left whatever becomes of it: with its first process the kernel ends all others, and with them go
links, mounts and rules. For the same reason no root is needed where users may have namespaces.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INSIDE = "BACALHAU_LAB"
_TOOLS = ("unshare", "nsenter", "mount", "ip", "tc", "nft")
_NEEDED = "on Debian: apt-get install iproute2 nftables"
_SWITCH = "switch"
_END_SECONDS = 30


class LabError(Exception):
    """The lab cannot be made here; says why and what helps."""


def unshare(*, is_root: bool) -> list[str]:
    """The command that runs another one in new namespaces, and ends everything in them with it."""
    words = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
    return words if is_root else [*words, "--map-root-user"]


def why_impossible() -> str:
    """Empty if a lab can be made on this machine; else the reason."""
    missing = [tool for tool in _TOOLS if shutil.which(tool, path=_path()) is None]
    if missing:
        return f"missing: {', '.join(missing)}; {_NEEDED}"
    tried = subprocess.run(
        [*unshare(is_root=os.geteuid() == 0), "sh", "-c", "mount -t tmpfs lab /run && ip link"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PATH": _path()},
    )
    return "" if tried.returncode == 0 else f"no namespaces: {tried.stderr.strip()}"


def enter(module: str, arguments: Sequence[str]) -> None:
    """Go on inside of a lab: returns there, and only there. Raises LabError."""
    os.environ["PATH"] = _path()
    if os.environ.get(_INSIDE) != "1":
        why = why_impossible()
        if why:
            raise LabError(why)
        os.environ[_INSIDE] = "1"
        command = [*unshare(is_root=os.geteuid() == 0), sys.executable, "-m", module, *arguments]
        os.execvp(command[0], command)
    del os.environ[_INSIDE]
    child = os.fork()
    if child:
        sys.exit(_reap_until(child))


def _reap_until(child: int) -> int:
    """The first process of a namespace inherits all orphans there, and has to bury them."""

    def pass_on(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    # The terminal tells the child of Ctrl-C, too; twice would cut short its tidying up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, pass_on)
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def _path() -> str:
    """With the places of system tools, which plain users often lack."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def sh(*words: str, text: str | None = None) -> str:
    """Run one tool. Raises LabError with its words if it fails."""
    done = subprocess.run(
        words, check=False, input=text, capture_output=True, text=True, timeout=_END_SECONDS
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(frozen=True, slots=True)
class Weather:
    """How a cable is. `up` carries what the party sends, `down` what it receives; lost packets in
    percent, each way; `kbit` a second, 0 for no limit; `is_plugged` the carrier itself."""

    up: bool = True
    down: bool = True
    loss_percent: int = 0
    kbit: int = 0
    delay_ms: int = 0
    is_plugged: bool = True


FAIR = Weather()


class Party:
    """One namespace with one cable to the switch."""

    def __init__(self, name: str, address: str, mtu: int, *, has_netem: bool) -> None:
        self.name = name
        self.address = address
        self.mtu = mtu
        self.weather = FAIR
        self._has_netem = has_netem
        self._far = f"to-{name}"
        sh("ip", "netns", "add", name)
        sh("ip", "link", "add", self._far, "type", "veth", "peer", "name", "eth0", "netns", name)
        sh("ip", "link", "set", self._far, "master", _SWITCH, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "set", "eth0", "mtu", str(mtu))
        self.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    @property
    def wrap(self) -> tuple[str, ...]:
        """Words before a command that is to run there (as one process)."""
        return ("nsenter", f"--net=/run/netns/{self.name}", "--")

    def run(self, *words: str, text: str | None = None) -> str:
        """Run one tool there."""
        return sh(*self.wrap, *words, text=text)

    def set(self, weather: Weather) -> None:
        """Change the cable."""
        if weather == self.weather:
            return
        self._filter(weather)
        self._shape(weather)
        if weather.is_plugged != self.weather.is_plugged:
            sh("ip", "link", "set", self._far, "up" if weather.is_plugged else "down")
        self.weather = weather

    def _filter(self, weather: Weather) -> None:
        loss = 0 if self._has_netem else weather.loss_percent
        lines = ["table inet cable", "delete table inet cable", "table inet cable {"]
        for chain, passes, name in (("input", weather.down, "i"), ("output", weather.up, "o")):
            lines.append(f"chain {chain} {{ type filter hook {chain} priority 0;")
            if not passes:
                lines.append(f'{name}ifname "eth0" drop')
            elif loss:
                lines.append(f'{name}ifname "eth0" numgen random mod 100 < {loss} drop')
            lines.append("}")
        self.run("nft", "-f", "-", text="\n".join([*lines, "}", ""]))

    def _shape(self, weather: Weather) -> None:
        """Both ends send slowly, so that both directions are slow."""
        if weather.kbit:
            words = ["tbf", "rate", f"{weather.kbit}kbit", "burst", "8kb", "latency", "500ms"]
        elif self._has_netem and (weather.delay_ms or weather.loss_percent):
            jitter = f"{weather.delay_ms // 2}ms"
            words = ["netem", "delay", f"{weather.delay_ms}ms", jitter]
            words += ["loss", f"{weather.loss_percent}%", "duplicate", "2%"]
        else:
            words = []
        for run, device in ((self.run, "eth0"), (sh, self._far)):
            if words:
                run("tc", "qdisc", "replace", "dev", device, "root", *words)
            elif self.weather.kbit or self._has_netem:
                with contextlib.suppress(LabError):  # there was none
                    run("tc", "qdisc", "del", "dev", device, "root")


class Lab:
    """The switch, in the command's own namespace, which has an address there too."""

    NETWORK = "10.9.8"

    def __init__(self) -> None:
        sh("mount", "-t", "tmpfs", "lab", "/run")  # where `ip netns` keeps its names
        sh("ip", "link", "set", "lo", "up")
        sh("ip", "link", "add", _SWITCH, "type", "bridge")
        sh("ip", "addr", "add", f"{self.NETWORK}.254/24", "dev", _SWITCH)
        sh("ip", "link", "set", _SWITCH, "up")
        self.has_netem = self._try_netem()
        self.parties: dict[str, Party] = {}

    def join(self, name: str, mtu: int = 1500) -> Party:
        """A new namespace on the switch."""
        address = f"{self.NETWORK}.{len(self.parties) + 1}"
        party = Party(name, address, mtu, has_netem=self.has_netem)
        self.parties[name] = party
        return party

    def small_disk(self, path: Path, megabytes: int) -> None:
        """Make a directory a disk of its own, which can be full."""
        path.mkdir(parents=True, exist_ok=True)
        sh("mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "disk", str(path))

    def drop_disk(self, path: Path) -> None:
        """The reverse of `small_disk`; what is still open there goes with its process."""
        sh("umount", "--lazy", str(path))

    def _try_netem(self) -> bool:
        """Not every kernel has it."""
        try:
            sh("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
        except LabError:
            return False
        sh("tc", "qdisc", "del", "dev", "lo", "root")
        return True
