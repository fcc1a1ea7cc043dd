"""Networks of containers: one bridge for all that ask for one, and for each job that may only use
listed domains an internal network of its own, with our proxy as the only way out.

From an internal network every service of the host is reachable through the gateway, so that the
firewall must let the proxy's port through and nothing else. Where that cannot be done (no iptables,
no right to use it, the engine in another network namespace), network HTTP is not offered.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

from bacalhau.engines.docker.body import LABEL_OWNER, LABEL_RUN, container_name
from bacalhau.engines.docker.client import EngineClient, RefusedError
from bacalhau.engines.docker.proxy import PORT, Proxy
from bacalhau.engines.docker.records import Record
from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError

logger = logging.getLogger(__name__)

IPTABLES_SECONDS = 20.0
_BRIDGE_NAME = "com.docker.network.bridge.name"
_BRIDGE_ICC = "com.docker.network.bridge.enable_icc"


@dataclass(slots=True)
class Networks:
    """The networks of one engine that are ours."""

    client: EngineClient
    owner: str
    allows_private: bool
    jobs_max: int
    _proxies: dict[str, Proxy] = field(default_factory=dict)
    _bridge: str = ""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def http_missing(self) -> str:
        """Why network HTTP cannot be offered, or ''."""
        if shutil.which("iptables") is None:
            return "iptables is not installed"
        if os.geteuid() != 0:
            return "the node does not run as root, and cannot close the way to the host's services"
        return ""

    async def bridge(self) -> str:
        """The bridge network for jobs, on which they do not see each other."""
        async with self._lock:
            if not self._bridge:
                name = f"bacalhau-{self.owner[:12]}"
                options = {_BRIDGE_ICC: "false"}
                await self._create(name, options=options, labels={LABEL_OWNER: self.owner})
                self._bridge = name
            return self._bridge

    def forget_bridge(self) -> None:
        """Look for the bridge again: the engine says that it is not there."""
        self._bridge = ""

    async def open_http(self, record: Record) -> tuple[str, dict[str, str]]:
        """Make a run's network with its proxy; its name, and the variables that lead to the proxy.

        May be called again for the same run. Raises TransientError if there are too many already.
        """
        missing = self.http_missing()
        if missing:
            raise UnavailableError(f"network HTTP is not offered here: {missing}")
        if len(self._proxies) >= self.jobs_max and record.run not in self._proxies:
            raise TransientError(
                f"{self.jobs_max} jobs with network HTTP run on this node already, which is as "
                "many as it may have"
            )
        name = container_name(self.owner, record.run)
        bridge = bridge_name(name)
        labels = {LABEL_OWNER: self.owner, LABEL_RUN: record.run}
        options = {_BRIDGE_NAME: bridge, _BRIDGE_ICC: "false"}
        await self._create(name, options=options, labels=labels, internal=True)
        gateway = await self._gateway(name)
        await _close_gateway(bridge, gateway)
        if record.run not in self._proxies:
            proxy = Proxy(record.domains, allows_private=self.allows_private)
            try:
                await proxy.open(gateway)
            except OSError as error:
                raise UnavailableError(
                    f"the proxy of network HTTP cannot listen on {gateway}: {error}; the engine "
                    "may be in another network namespace than this node"
                ) from error
            self._proxies[record.run] = proxy
        url = f"http://{gateway}:{PORT}"
        names = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        return name, dict.fromkeys(names, url)

    async def adopt(self, record: Record) -> None:
        """Give a run that goes on its proxy again. Its failure cuts the run off, no more."""
        try:
            await self.open_http(record)
        except BacalhauError as error:
            extra = {"run": record.run, "error": error.message}
            logger.warning("A run is without its proxy", extra=extra)

    async def release(self, run: str) -> None:
        """Remove a run's network, once its container is gone. May be called again."""
        proxy = self._proxies.pop(run, None)
        if proxy is not None:
            await proxy.close()
        name = container_name(self.owner, run)
        try:
            await self.client.ask("remove_network", name)
        except RefusedError as error:
            if error.status != 404:
                raise TransientError(f"network {name} cannot be removed: {error}") from error
        await _open_gateway(bridge_name(name))

    async def sweep(self, known: set[str]) -> None:
        """Remove the networks of runs that are not known any more."""
        try:
            found = await self.client.ask(
                "networks", filters={"label": f"{LABEL_OWNER}={self.owner}"}
            )
        except RefusedError:
            return
        for one in found:
            run = (one.get("Labels") or {}).get(LABEL_RUN)
            if run and run not in known:
                with contextlib.suppress(BacalhauError):
                    await self.release(run)

    async def close(self) -> None:
        """Stop the proxies; the networks stay for the runs that go on."""
        for proxy in self._proxies.values():
            await proxy.close()
        self._proxies.clear()

    async def remove_bridge(self) -> None:
        """Remove the bridge if nobody uses it."""
        with contextlib.suppress(RefusedError, BacalhauError):
            await self.client.ask("remove_network", f"bacalhau-{self.owner[:12]}")
        self._bridge = ""

    # -- the engine ------------------------------------------------------------------------------

    async def _create(self, name: str, **arguments: Any) -> None:
        """Create a network, unless there is one of that name."""
        if await self._inspect(name) is not None:
            return
        try:
            await self.client.ask(
                "create_network", name, driver="bridge", check_duplicate=True, **arguments
            )
        except RefusedError as error:
            if error.status == 409:
                return
            raise TransientError(f"a network cannot be made: {error}") from error

    async def _inspect(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = await self.client.ask("inspect_network", name)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise UnavailableError(f"the engine could not show a network: {error}") from error
        return found

    async def _gateway(self, name: str) -> str:
        found = await self._inspect(name) or {}
        for config in (found.get("IPAM") or {}).get("Config") or ():
            if config.get("Gateway"):
                return str(config["Gateway"]).partition("/")[0]
        raise UnavailableError(f"network {name} has no gateway")


def bridge_name(network: str) -> str:
    """The name of a network's interface on the host: at most 15 characters."""
    return "bh-" + hashlib.sha256(network.encode()).hexdigest()[:10]


async def _close_gateway(bridge: str, gateway: str) -> None:
    """Let nothing through from a bridge to the host but to the proxy."""
    for rule in _rules(bridge):
        if await _iptables("-C", "INPUT", *rule):
            continue
        # The last of them, the one that drops, comes first: there is no moment without it.
        if not await _iptables("-I", "INPUT", "1", *rule):
            raise UnavailableError(
                f"network HTTP is not offered: the firewall rules for {bridge} ({gateway}) cannot "
                "be made with iptables"
            )


async def _open_gateway(bridge: str) -> None:
    """Take the rules of a bridge away."""
    for rule in _rules(bridge):
        while await _iptables("-D", "INPUT", *rule):
            pass


def _rules(bridge: str) -> tuple[tuple[str, ...], ...]:
    return (
        ("-i", bridge, "-j", "DROP"),
        ("-i", bridge, "-p", "tcp", "--dport", str(PORT), "-j", "ACCEPT"),
    )


async def _iptables(*arguments: str) -> bool:
    """Whether it said yes."""
    try:
        process = await asyncio.create_subprocess_exec(
            "iptables", "-w", "5", *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        return False
    try:
        async with asyncio.timeout(IPTABLES_SECONDS):
            return await process.wait() == 0
    except TimeoutError:
        process.kill()
        await process.wait()
        return False
