"""Ports of the host for containers on the bridge, and on the host's own network."""

import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from bacalhau.engines.docker.body import PortMapping
from bacalhau_api.errors import TransientError
from bacalhau_api.v1.job import Network, NetworkType


@dataclass(slots=True)
class PortRange:
    """Chooses free ports, the next one each time, so that one is not used again at once."""

    first: int
    last: int
    _next: int = 0

    def choose(self, network: Network, taken: Iterable[int]) -> tuple[PortMapping, ...]:
        """A mapping for each port the job names. Raises TransientError (PortTaken) if a port it
        insists on is in use, or none is free."""
        used = set(taken)
        used.update(port.static for port in network.ports if port.static)
        mappings = []
        for port in network.ports:
            host = port.static
            if host and not _is_free(host, port.host_network):
                raise TransientError(
                    f"port {host} ({port.name}) is in use on this node", reason="PortTaken"
                )
            if not host:
                host = self._free(used, port.host_network)
            used.add(host)
            inner = host if network.type is not NetworkType.BRIDGE else port.target or host
            mappings.append(PortMapping(port.name, host, inner, port.host_network))
        return tuple(mappings)

    def _free(self, used: set[int], address: str) -> int:
        size = self.last - self.first + 1
        for _ in range(size):
            port = self.first + self._next % size
            self._next += 1
            if port not in used and _is_free(port, address):
                return port
        raise TransientError(
            f"no port between {self.first} and {self.last} is free", reason="PortTaken"
        )


def variables(ports: Iterable[PortMapping]) -> dict[str, str]:
    """What a container is told of its ports."""
    found = {}
    for port in ports:
        found[f"BACALHAU_PORT_{port.name}"] = str(port.container)
        found[f"BACALHAU_HOST_PORT_{port.name}"] = str(port.host)
    return found


def _is_free(port: int, address: str) -> bool:
    """Whether nobody listens there now. Somebody may a moment later: then the start fails, and is
    tried again with another one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address or "0.0.0.0", port))
        return True
    return False
