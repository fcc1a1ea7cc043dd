"""Amounts with units, as users write them: CPU, bytes, devices, and durations in seconds.

CPU is counted in millicores (`500m`, `0.5`, `2`), bytes in SI (1000) and IEC (1024) units in any
letter case. `m` and `Mb` are 10^6 bytes. Spaces do not matter. Each parser raises ValueError with a
message for users; each printer gives a short text that its parser reads back unchanged.
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

INT64_MAX: Final = 2**63 - 1
CPU_MILLIS_MAX: Final = 10**9
_LENGTH_MAX = 64
_SPACE = re.compile(r"\s+")
_CPU = re.compile(r"([0-9]+)m|([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([a-z]*)")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h|d)")

_PREFIXES: Final = "kmgtpe"
_SI: Final = {p: 1000 ** (n + 1) for n, p in enumerate(_PREFIXES)}
_IEC: Final = {f"{p}i": 1024 ** (n + 1) for n, p in enumerate(_PREFIXES)}
_UNITS: Final = {"": 1, "b": 1} | {
    unit + b: size for unit, size in (_SI | _IEC).items() for b in ("", "b")
}
_SECONDS: Final = {
    "ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600),
    "d": Fraction(86400),
}  # fmt: skip


def _squeezed(text: str, example: str) -> str:
    squeezed = _SPACE.sub("", text[: 4 * _LENGTH_MAX])
    if squeezed.startswith("-"):
        raise ValueError("must not be negative")
    if len(text) > 4 * _LENGTH_MAX or len(squeezed) > _LENGTH_MAX or not squeezed.isascii():
        raise ValueError(f"is not a quantity; write it like {example}")
    return squeezed.lower()


def parse_cpu(text: str) -> int:
    """Millicores of `500m` (millicores) or `0.5`, `2` (cores), truncated to one millicore.
    Empty text is 0, which means the default."""
    squeezed = _squeezed(text, "500m or 0.5")
    if not squeezed:
        return 0
    match = _CPU.fullmatch(squeezed)
    if match is None:
        raise ValueError("is not an amount of CPU; write millicores like 500m or cores like 0.5")
    millis, cores = match.groups()
    exact = Fraction(millis) if millis else Fraction(cores) * 1000
    if 0 < exact < 1:
        raise ValueError("is less than one millicore (1m)")
    if exact > CPU_MILLIS_MAX:
        raise ValueError(f"is more than {CPU_MILLIS_MAX // 1000} cores")
    return int(exact)


def parse_bytes(text: str) -> int:
    """Bytes of a number (decimals allowed) with an optional unit, truncated to whole bytes.
    Empty text is 0, which means the default."""
    squeezed = _squeezed(text, "512Mi or 1.5GB")
    if not squeezed:
        return 0
    match = _BYTES.fullmatch(squeezed)
    if match is None:
        raise ValueError("is not an amount of bytes; write it like 512Mi or 1.5GB")
    number, unit = match.groups()
    if unit not in _UNITS:
        raise ValueError(
            f"has the unknown unit {unit!r}; use B, kB, MB, GB, TB, PB, EB (1000) "
            "or Ki, Mi, Gi, Ti, Pi, Ei (1024)"
        )
    exact = Fraction(number) * _UNITS[unit]
    if exact > INT64_MAX:
        raise ValueError("is more than 8 EiB")
    return int(exact)


def parse_gpu(text: str) -> int:
    """A number of devices. Empty text is 0."""
    squeezed = _squeezed(text, "1")
    if not squeezed:
        return 0
    if not squeezed.isascii() or not squeezed.isdigit() or len(squeezed) > 6:
        raise ValueError("is not a number of GPUs; write a whole number such as 1")
    return int(squeezed)


def format_cpu(millis: int) -> str:
    """The short text of so many millicores: `2`, `500m`."""
    return f"{millis}m" if millis % 1000 else str(millis // 1000)


def format_bytes(size: int) -> str:
    """The shortest exact text of so many bytes: `512MB`, `1Gi`, `1234567`."""
    best = str(size)
    if size == 0:
        return best
    for prefix in _PREFIXES:
        for unit, shown in ((f"{prefix}i", f"{prefix.upper()}i"), (prefix, f"{prefix.upper()}B")):
            count, rest = divmod(size, _UNITS[unit])
            text = f"{count}{shown if shown != 'KB' else 'kB'}"
            if rest == 0 and len(text) < len(best):
                best = text
    return best


def parse_seconds(text: str) -> Fraction:
    """Seconds of a duration such as `90s`, `1h30m`, `1.5h`, `500ms`, or of a plain number."""
    squeezed = _squeezed(text, "90s or 1h30m")
    position, total = 0, Fraction(0)
    while match := _DURATION.match(squeezed, position):
        total += Fraction(match[1]) * _SECONDS[match[2]]
        position = match.end()
    if position == 0 and re.fullmatch(r"[0-9]+(\.[0-9]*)?|\.[0-9]+", squeezed):
        return Fraction(squeezed)
    if position == 0 or position != len(squeezed):
        raise ValueError("is not a duration; write seconds like 90, or a text like 90s or 1h30m")
    if total > INT64_MAX:
        raise ValueError("is too long a time")
    return total


def format_seconds(seconds: int) -> str:
    """The text of so many whole seconds: `1h30m`, `90s` as `1m30s`, `0s`."""
    hours, rest = divmod(seconds, 3600)
    minutes, left = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "m"), (left, "s")]
    return "".join(f"{n}{unit}" for n, unit in parts if n) or "0s"


def from_quantities(amounts: Mapping[str, Any]) -> dict[str, Any]:
    """Resources given as quantities (`{"cpu": "500m", "memory": "512Mi"}`), by their wire names.

    What is given by its wire name stays as it is. Raises ValueError that names the resource.
    """
    found = dict(amounts)
    for name, wire, parse in (
        ("cpu", "cpuMillis", parse_cpu),
        ("memory", "memoryBytes", parse_bytes),
        ("disk", "diskBytes", parse_bytes),
        ("gpu", "gpu", parse_gpu),
    ):
        given = found.get(name)
        if given is None or (name == wire and not isinstance(given, str)):
            continue
        if name != wire and wire in found:
            raise ValueError(f"{name} and {wire} are both given")
        del found[name]
        try:
            found[wire] = parse(str(given))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    return found


def to_quantities(amounts: Mapping[str, Any]) -> dict[str, Any]:
    """The opposite: resources by wire names, as short quantities for people."""
    found = dict(amounts)
    for name, wire, shown in (
        ("cpu", "cpuMillis", format_cpu),
        ("memory", "memoryBytes", format_bytes),
        ("disk", "diskBytes", format_bytes),
    ):
        if wire in found:
            found[name] = shown(found.pop(wire))
    order = ("cpu", "memory", "disk", "gpu")
    return {name: found[name] for name in order if name in found}
