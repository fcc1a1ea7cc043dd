"""Which partition of a job an object belongs to: a pure function of its key, so that each object is
in exactly one, whoever asks.

The partition is the FNV-1a hash (32 bits) of a part of the key, modulo the number of partitions:

    none        every partition gets every object
    object      the whole key
    regex       the groups of a pattern (joined by U+001F), or all that it matches
    substring   characters startIndex to endIndex
    date        a date in the layout dateFormat, at the beginning

All but `object` look at what follows the prefix. A key in which nothing is found is in partition 0.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Final

from bacalhau.storages.objects import expression
from bacalhau_api.errors import TerminalError
from bacalhau_api.params import S3Partition

_SEPARATOR: Final = "\x1f"
_MONTHS: Final = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip

# Words of a layout, longest first: what they match, and how the value is written again.
_LAYOUT: Final[tuple[tuple[str, str, str], ...]] = (
    ("January", "(?P<{}>" + "|".join(_MONTHS) + ")", "monthName"),
    ("2006", r"(?P<{}>\d{{4}})", "year4"),
    ("Jan", "(?P<{}>" + "|".join(m[:3] for m in _MONTHS) + ")", "monthShort"),
    ("002", r"(?P<{}>\d{{3}})", "yearday"),
    ("06", r"(?P<{}>\d\d)", "year2"),
    ("01", r"(?P<{}>\d\d)", "month2"),
    ("02", r"(?P<{}>\d\d)", "day2"),
    ("15", r"(?P<{}>\d\d)", "hour2"),
    ("04", r"(?P<{}>\d\d)", "minute2"),
    ("05", r"(?P<{}>\d\d)", "second2"),
    ("1", r"(?P<{}>\d{{1,2}})", "month1"),
    ("2", r"(?P<{}>\d{{1,2}})", "day1"),
)
_RANGES: Final = {
    "month2": (1, 12), "month1": (1, 12), "day2": (1, 31), "day1": (1, 31), "hour2": (0, 23),
    "minute2": (0, 59), "second2": (0, 59), "yearday": (1, 366),
}  # fmt: skip

KeyPart = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Partitioner:
    """Shares out keys among `count` partitions. `prefix` is what the listing was asked for."""

    strategy: S3Partition
    prefix: str
    count: int

    def assign(self, keys: list[str]) -> list[int | None]:
        """The partition of each key; None: every one. Raises TerminalError for wrong params."""
        if self.strategy.type == "none" or self.count <= 1:
            return [None] * len(keys)
        part = self._key_part()
        return [0 if (found := part(key)) is None else fnv1a(found) % self.count for key in keys]

    def check(self) -> None:
        """Raises TerminalError for params that cannot be used."""
        if self.strategy.type != "none":
            self._key_part()

    def _key_part(self) -> KeyPart:
        strategy = self.strategy
        if strategy.type == "object":
            return lambda key: key
        if strategy.type == "regex":
            if not strategy.pattern:
                raise _invalid("pattern", "is missing; the type regex needs one")
            search = expression(strategy.pattern, "partition.pattern").search
            return lambda key: _groups(search(self._rest(key)))
        if strategy.type == "substring":
            start, end = strategy.start_index, strategy.end_index
            if end <= start:
                raise _invalid("endIndex", f"must be greater than startIndex (got {start}, {end})")
            return lambda key: self._rest(key)[start:end] if len(self._rest(key)) >= end else None
        if not strategy.date_format:
            raise _invalid("dateFormat", "is missing; the type date needs one, such as 2006-01-02")
        layout = Layout(strategy.date_format)
        return lambda key: layout.read(self._rest(key))

    def _rest(self, key: str) -> str:
        return key.removeprefix(self.prefix).lstrip("/")


class Layout:
    """A date layout written as the reference date 2006-01-02 15:04:05 would be."""

    def __init__(self, text: str) -> None:
        self._words: list[str] = []
        pattern, at = [], 0
        while at < len(text):
            for word, match, name in _LAYOUT:
                if text.startswith(word, at):
                    # A value that is named twice must be the same twice: the last one counts.
                    label = f"{name}_{len(self._words)}"
                    self._words.append(label)
                    pattern.append(match.format(label))
                    at += len(word)
                    break
            else:
                pattern.append(re.escape(text[at]))
                self._words.append(f"={text[at]}")
                at += 1
        if all(word.startswith("=") for word in self._words):
            raise _invalid("dateFormat", f"{text[:80]!r} names no part of a date, such as 2006-01")
        self._pattern = re.compile("".join(pattern))

    def read(self, text: str) -> str | None:
        """The date at the beginning, written in this layout; None if there is none."""
        found = self._pattern.match(text)
        if found is None:
            return None
        values = {name.partition("_")[0]: value for name, value in found.groupdict().items()}
        if not _is_date(values):
            return None
        out: list[str] = []
        for word in self._words:
            name = word.partition("_")[0]
            if word.startswith("="):
                out.append(word[1:])
            elif name in ("month1", "day1"):
                out.append(str(int(found[word])))
            else:
                out.append(found[word])
        return "".join(out)


def fnv1a(text: str) -> int:
    """The 32-bit FNV-1a hash of a text's UTF-8."""
    value = 0x811C9DC5
    for byte in text.encode("utf-8", "surrogateescape"):
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _groups(found: object) -> str | None:
    if found is None:
        return None
    groups: tuple[str | None, ...] = found.groups()  # type: ignore[attr-defined]
    if groups:
        return _SEPARATOR.join(group or "" for group in groups)
    whole: str = found.group(0)  # type: ignore[attr-defined]
    return whole


def _is_date(values: dict[str, str]) -> bool:
    for name, (low, high) in _RANGES.items():
        if name in values and not low <= int(values[name]) <= high:
            return False
    day = values.get("day2") or values.get("day1")
    if day is None:
        return True
    month = values.get("month2") or values.get("month1")
    for name, size in (("monthName", None), ("monthShort", 3)):
        if name in values:
            month = str([m[:size] for m in _MONTHS].index(values[name]) + 1)
    year = values.get("year4") or (f"20{values['year2']}" if "year2" in values else "2000")
    try:
        date(int(year), int(month or 1), int(day))
    except ValueError:
        return False
    return True


def _invalid(field: str, words: str) -> TerminalError:
    return TerminalError(f"source s3: params.partition.{field} {words}", reason="InvalidInput")
