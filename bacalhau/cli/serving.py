"""The options of `serve`, turned from what was typed into settings. Raises InvalidError, which
names the option."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from bacalhau.cli.exits import usage
from bacalhau.settings import (
    INPUT_CACHE_BYTES,
    AllowedPath,
    CapacityOverrides,
    ProbeSettings,
    Role,
    TransferSettings,
)

T = TypeVar("T", bound=str)

RATE_MIN: Final = 1024
"""Bytes a second. With less, no piece arrives before whoever asked for it gives up."""

_ROLES: Final[dict[frozenset[str], Role]] = {
    frozenset({"orchestrator"}): "orchestrator",
    frozenset({"compute"}): "compute",
    frozenset({"both"}): "both",
    frozenset({"orchestrator", "compute"}): "both",
}


def parse_role(role: str, orchestrator: str, compute: bool, here: str) -> Role:
    """Which parts to run, from `--role`, `--compute` and `--orchestrator`, of which the last is
    `here` where it stood alone."""
    if role:
        words = frozenset(word.strip().lower() for word in role.split(","))
        if words not in _ROLES:
            raise _wrong("--role", role, "use orchestrator, compute or both")
        found = _ROLES[words]
        if orchestrator not in ("", here) and found != "compute":
            hint = "an address is for --role compute: that of the orchestrator to join"
            raise _wrong("--orchestrator", orchestrator, hint)
        return found
    if orchestrator == here:
        return "both" if compute else "orchestrator"
    return "compute" if compute or orchestrator else "both"


def parse_orchestrator(orchestrator: str, role: Role, here: str) -> str:
    """The address of the orchestrator to join; empty unless the role is compute."""
    if role != "compute":
        return ""
    if orchestrator in ("", here):
        hint = "add --orchestrator URL, the address of its API"
        raise _wrong("--role", role, f"a compute node needs an orchestrator to join: {hint}")
    from bacalhau.client.address import check_server

    return check_server(orchestrator)


def parse_gitops(texts: Sequence[str], role: Role) -> tuple[tuple[str, Path], ...]:
    """Watched directories, each `DIR` or `NAME=DIR`."""
    if not texts:
        return ()
    from bacalhau.gitops.place import parse_place

    if role == "compute":
        hint = "an orchestrator watches directories; or run one here: bacalhau gitops run DIR"
        raise _wrong("--gitops", texts[0], hint)
    found: dict[str, Path] = {}
    for text in texts:
        name, root = parse_place(text)
        if name in found:
            raise _wrong("--gitops", text, f"{name} is named twice: write NAME=DIR")
        found[name] = root
    return tuple(found.items())


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` each."""
    from bacalhau_api.names import check_label_key, check_label_value

    labels = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise _wrong("--label", text, "write KEY=VALUE")
        try:
            labels[check_label_key(key.strip())] = check_label_value(value.strip())
        except ValueError as error:
            raise _wrong("--label", text, str(error)) from error
    return labels


def parse_allowed(text: str) -> AllowedPath:
    """`PATTERN`, `PATTERN:ro` or `PATTERN:rw`."""
    pattern, colon, mode = text.rpartition(":")
    if not colon or mode.lower() not in ("ro", "rw"):
        pattern, mode = text, "ro"
    if not pattern.startswith("/"):
        raise _wrong("--allow-path", text, "write an absolute path, such as /data/**:ro")
    return AllowedPath(pattern, writable=mode.lower() == "rw")


def parse_capacity(
    cpu: str, memory: str, disk: str, gpu: int | None, executions_max: int | None
) -> CapacityOverrides:
    """What the node is to offer; None where nothing was said."""
    from bacalhau_api.quantity import parse_bytes, parse_cpu

    return CapacityOverrides(
        cpu_millis=_quantity("--cpu", cpu, parse_cpu),
        memory_bytes=_quantity("--memory", memory, parse_bytes),
        disk_bytes=_quantity("--disk", disk, parse_bytes),
        gpu=gpu,
        executions_max=executions_max,
    )


def parse_networks(texts: Sequence[str]) -> tuple[str, ...]:
    """Names of networks in any letter case; Full is the old name of Host."""
    known = {name.lower(): name for name in ("HTTP", "Bridge", "Host")}
    found = []
    for text in texts:
        name = known.get(text.strip().lower())
        if name is None:
            raise _wrong("--allow-network", text, f"use {', '.join(known.values())}")
        found.append(name)
    return tuple(found)


def parse_probes(command: str, url: str, seconds: float) -> ProbeSettings:
    """Whom the node asks for leave."""
    if url:
        from urllib.parse import urlsplit

        try:
            parts = urlsplit(url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_url = is_url and parts.port != 0  # raises ValueError for what is no port
        except ValueError:
            is_url = False
        if not is_url:
            raise _wrong("--probe-http", url, "write a URL such as http://127.0.0.1:8080/admit")
    return ProbeSettings(command.strip(), url, seconds)


def parse_size(option: str, text: str) -> int | None:
    """An amount of bytes; None where nothing was said."""
    from bacalhau_api.quantity import parse_bytes

    return _quantity(option, text, parse_bytes)


def parse_rate(option: str, text: str) -> int | None:
    """Bytes a second, with or without the `/s`; None where nothing was said, or 0."""
    rate = parse_size(option, text.strip().removesuffix("/s"))
    if rate is not None and 0 < rate < RATE_MIN:
        raise _wrong(option, text, f"use at least {RATE_MIN} bytes a second, or 0 for no limit")
    return rate or None


def parse_span(option: str, text: str) -> float:
    """Seconds of a duration such as `7d` or `90m`."""
    from bacalhau_api.quantity import parse_seconds

    try:
        return float(parse_seconds(text))
    except ValueError as error:
        raise _wrong(option, text, str(error)) from error


def parse_transfers(
    *,
    cache: str,
    input_max: str,
    addresses: Sequence[str],
    allow_private: bool,
    s3_endpoints: Sequence[str],
    ipfs_api: str,
    ipfs_gateway: str,
    ipfs_seconds: float,
    protocols: Sequence[str],
) -> TransferSettings:
    """What jobs may fetch from and publish to."""
    from bacalhau.storages.protocols import check_protocol
    from bacalhau.transfer.addresses import AllowedAddress
    from bacalhau.transfer.s3 import normal_endpoint
    from bacalhau_api.quantity import parse_bytes

    room = _quantity("--input-cache", cache, parse_bytes)
    return TransferSettings(
        cache_bytes=INPUT_CACHE_BYTES if room is None else room,
        input_bytes_max=_quantity("--input-max-size", input_max, parse_bytes) or 0,
        addresses=tuple(
            _checked("--allow-address", one, lambda text: str(AllowedAddress.parse(text)))
            for one in addresses
        ),
        allow_private=allow_private,
        s3_endpoints=tuple(_checked("--s3-endpoint", one, normal_endpoint) for one in s3_endpoints),
        ipfs_api=_checked("--ipfs-api", ipfs_api, normal_endpoint) if ipfs_api else "",
        ipfs_gateway=_checked("--ipfs-gateway", ipfs_gateway, normal_endpoint)
        if ipfs_gateway
        else "",
        ipfs_seconds=ipfs_seconds,
        protocols=tuple(_checked("--allow-protocol", one, check_protocol) for one in protocols),
    )


def _checked(option: str, text: str, check: Callable[[str], str]) -> str:
    try:
        return check(text)
    except ValueError as error:
        raise _wrong(option, text, str(error)) from error


def _quantity(option: str, text: str, parse: Callable[[str], int]) -> int | None:
    if not text.strip():
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise _wrong(option, text, str(error)) from error


def choose(option: str, text: str, choices: tuple[T, ...]) -> T:
    """One of a few words."""
    for choice in choices:
        if text.lower() == choice:
            return choice
    raise _wrong(option, text, f"use {', '.join(choices)}")


def _wrong(option: str, value: str, hint: str) -> Exception:
    return usage(option, "is not right", value[:200], hint)
