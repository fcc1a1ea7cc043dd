"""Which network addresses a node connects to on behalf of a job.

A job names a host; what counts is the address that the name leads to at the moment of connecting.
By default these are public addresses only: never the node itself, its neighbours, or the services
that clouds keep at well-known addresses to hand out credentials.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bacalhau_api.errors import TerminalError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16",
                 "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)  # fmt: skip
"""Where clouds serve credentials and metadata. One of them is a public address."""

_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class AddressRefusedError(TerminalError):
    """This node does not connect there for jobs; the message names host, address and remedy."""

    reason = "AddressRefused"


@dataclass(frozen=True, slots=True)
class AllowedAddress:
    """An exception that the operator made. `port` 0: any."""

    network: Network
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> "AllowedAddress":
        """`ADDRESS[/BITS][:PORT]`, an IPv6 address with port in brackets. Raises ValueError."""
        match = re.fullmatch(r"\[([0-9A-Fa-f:.]+(?:/\d+)?)\](?::(\d+))?", text)
        if match is None and text.count(":") <= 1:
            match = re.fullmatch(r"([0-9.]+(?:/\d+)?)(?::(\d+))?", text)
        host, port = match.groups() if match else (text, None)
        if port is not None and not 0 < int(port) < 65536:
            raise ValueError(f"{port} is not a port")
        return cls(ipaddress.ip_network(host, strict=False), int(port or 0))

    def covers(self, address: Address, port: int) -> bool:
        """True if this exception is about such a connection."""
        return (
            address.version == self.network.version
            and address in self.network
            and self.port in (0, port)
        )

    def __str__(self) -> str:
        host = f"[{self.network}]" if self.network.version == 6 else str(self.network)
        return f"{host}:{self.port}" if self.port else host


class AddressPolicy:
    """Vets addresses. `allowed` are exceptions; `allow_private` lets jobs reach private and
    loopback addresses, but for metadata services and link-local ones."""

    def __init__(
        self, allowed: Sequence[AllowedAddress] = (), *, allow_private: bool = False
    ) -> None:
        self._allowed = tuple(allowed)
        self._allow_private = allow_private

    def refusal(self, address: str, port: int) -> str:
        """Why not, in words that follow "is"; empty if it is fine. `address` is numeric."""
        ip = ipaddress.ip_address(address.partition("%")[0])
        real = _real(ip)
        if any(one.covers(real, port) or one.covers(ip, port) for one in self._allowed):
            return ""
        if real in METADATA:
            return "a metadata service"
        if real.is_link_local:
            return "a link-local address"
        if real.is_multicast or real.is_unspecified or _is_broadcast(real):
            return "not the address of one machine"
        if self._allow_private or (real.is_global and not real.is_reserved):
            return ""
        return "a loopback address" if real.is_loopback else "a private or reserved address"

    def check(self, host: str, address: str, port: int) -> None:
        """Raises AddressRefusedError."""
        why = self.refusal(address, port)
        if why:
            leads = f"{host} is" if host == address else f"{host} leads to {address}, which is"
            raise AddressRefusedError(
                f"{leads} {why}, where this node does not connect for jobs; its operator can "
                f"allow it with --allow-address {_shown(address)}:{port}"
            )


def _real(ip: Address) -> Address:
    """The IPv4 address within an IPv6 one that only wraps it."""
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner:
            return inner
        if ip in _NAT64 or (int(ip) >> 32 == 0 and int(ip) > 1):
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _is_broadcast(ip: Address) -> bool:
    return ip == ipaddress.IPv4Address("255.255.255.255")


def _shown(address: str) -> str:
    return f"[{address}]" if ":" in address else address
