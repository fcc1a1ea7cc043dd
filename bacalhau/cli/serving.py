"""The options of `serve`, turned from what was typed into settings. Raises InvalidError, which
names the option."""

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from bacalhau.cli.exits import usage
from bacalhau.settings import AllowedPath, CapacityOverrides, Role

T = TypeVar("T", bound=str)

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
