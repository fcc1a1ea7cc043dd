"""Text for terminals: safe, aligned, short. Nothing here is imported that takes time."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

# Control characters, and those that reorder or hide what follows: a name or message of an object
# must not be able to move the cursor, recolour, or make one thing look like another.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_UNSAFE_IN_LINES = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def clean(value: object) -> str:
    """One line of safe text."""
    return _UNSAFE.sub("", str(value).replace("\n", " "))


def clean_lines(text: str) -> str:
    """Safe text that keeps its lines and tabs."""
    return _UNSAFE_IN_LINES.sub("", text)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns of equal width, two spaces apart, without trailing blanks."""
    cells = [[clean(cell) for cell in row] for row in [headers, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def parse_time(text: object) -> datetime | None:
    """A time as it is on the wire; None if there is none."""
    if not isinstance(text, str) or not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def age(then: object, now: datetime) -> str:
    """How long ago, such as `5m` or `3d4h`; `-` where there is no time."""
    moment = parse_time(then)
    return "-" if moment is None else duration(now - moment)


def duration(span: timedelta) -> str:
    """A span in at most two units."""
    seconds = max(0, int(span.total_seconds()))
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "m")]
    for index, (count, unit) in enumerate(parts):
        if count:
            below, small = [*parts, (seconds % 60, "s")][index + 1]
            # Small change beside a large amount says nothing.
            show = below and count < 10
            return f"{count}{unit}{below}{small}" if show else f"{count}{unit}"
    return f"{seconds}s"


def size(count: object) -> str:
    """Bytes for people."""
    if not isinstance(count, int | float):
        return "-"
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def now() -> datetime:
    """The present, for ages."""
    return datetime.now(UTC)
