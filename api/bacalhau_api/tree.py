"""A document as it was written: values with their lines, and with the text of each scalar.

Between reading (`yamlsafe`) and typing (`shape`) stands this tree. It lets an error name the field
as its user wrote it, and lets a text field take `1.10` or `on` as written, whatever YAML would
make of it.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

from bacalhau_api.names import check_text

DEPTH_MAX: Final = 64
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_$-]{1,64}")

Plain = str | int | float | bool | None


class Node:
    """One value. `line` counts from 1, 0 means unknown; `parent` and `key` say where it stands."""

    __slots__ = ("key", "line", "parent")

    def __init__(self, line: int = 0) -> None:
        self.line = line
        self.parent: Node | None = None
        self.key: str | int = ""

    def under(self, parent: "Node", key: str | int) -> None:
        """Say where this value stands."""
        self.parent = parent
        self.key = key

    def standing_for(self, other: "Node") -> None:
        """Take the place and line of another value, which this one replaces."""
        self.line, self.parent, self.key = other.line, other.parent, other.key

    @property
    def path(self) -> str:
        """Where it stands, such as `spec.tasks[0].engine.type`; empty for a whole document."""
        keys: list[str | int] = []
        node: Node = self
        while node.parent is not None:
            keys.append(node.key)
            node = node.parent
        return path_of(keys[::-1])


class Scalar(Node):
    """Text, a number, a boolean or nothing.

    `text` is what was written (for quoted text, what it means). `bad` says why the value can only
    be taken as text: a number beyond 64 bits, or one that is not finite. Without text, it cannot be
    taken at all.
    """

    __slots__ = ("bad", "text", "value")

    def __init__(self, value: Plain, text: str, line: int = 0, bad: str = "") -> None:
        super().__init__(line)
        self.value = value
        self.text = text
        self.bad = bad


class Items(Node):
    """A list."""

    __slots__ = ("items",)

    def __init__(self, line: int = 0) -> None:
        super().__init__(line)
        self.items: list[Node] = []

    def add(self, item: Node) -> None:
        """Append a value and say where it stands."""
        item.under(self, len(self.items))
        self.items.append(item)


class Fields(Node):
    """A mapping with text keys, in the order written."""

    __slots__ = ("entries",)

    def __init__(self, line: int = 0) -> None:
        super().__init__(line)
        self.entries: dict[str, Node] = {}

    def put(self, key: str, value: Node) -> None:
        """Add a value and say where it stands."""
        value.under(self, key)
        self.entries[key] = value

    def find(self, name: str) -> Node | None:
        """The value of a key in any letter case, exact match preferred."""
        if name in self.entries:
            return self.entries[name]
        folded = name.lower()
        return next((v for k, v in self.entries.items() if k.lower() == folded), None)


def is_null(node: Node | None) -> bool:
    """True for nothing: an absent value, or one written as null, `~` or left empty."""
    return node is None or (isinstance(node, Scalar) and node.value is None and not node.bad)


def path_of(keys: Sequence[str | int]) -> str:
    """The text of a path: names joined by dots, positions in brackets."""
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        elif _PLAIN_KEY.fullmatch(key):
            path += f".{key}" if path else key
        else:
            path += f"[{shorten(key)}]"
    return path


def shorten(text: str, length_max: int = 60) -> str:
    """Text as it can be shown in a message: quoted, on one line, printable, cut where it is long."""
    cut = text[:length_max]
    quoted = ascii(cut) if not cut.isprintable() else repr(cut)
    return quoted if len(text) <= length_max else f"{quoted[:-1]}…{quoted[-1]}"


def shown(node: Node) -> str:
    """A short rendering of a value, for messages."""
    if isinstance(node, Items):
        return f"a list of {len(node.items)}"
    if isinstance(node, Fields):
        return f"a mapping of {len(node.entries)}"
    if not isinstance(node, Scalar) or is_null(node):
        return "nothing"
    is_text = isinstance(node.value, str) or len(node.text) > 40
    return shorten(node.text) if is_text else node.text


def from_plain(data: object, depth: int = 0) -> Node:
    """The tree of plain Python data and times, for values that did not come from a file.

    What is not plain data, or nested too deep, becomes a scalar that is `bad`.
    """
    if depth > DEPTH_MAX:
        return Scalar("", "", bad=f"is nested deeper than {DEPTH_MAX} levels")
    if isinstance(data, Mapping):
        fields = Fields()
        for key, value in data.items():
            name, bad = _usable(str(key))
            child = from_plain(value, depth + 1)
            fields.put(name, Scalar("", "", bad=f"has a name that {bad}") if bad else child)
        return fields
    if isinstance(data, list | tuple):
        items = Items()
        for value in data:
            items.add(from_plain(value, depth + 1))
        return items
    if data is None:
        return Scalar(None, "")
    if isinstance(data, bool):
        return Scalar(data, "true" if data else "false")
    if isinstance(data, str):
        text, bad = _usable(str(data))
        return Scalar(text, text, bad=bad)
    if isinstance(data, int):
        return int_scalar(data)
    if isinstance(data, float):
        return float_scalar(data)
    if isinstance(data, datetime):
        return Scalar(data.isoformat(), data.isoformat())
    return Scalar("", "", bad=f"is not plain data, but of type {type(data).__name__}")


def _usable(text: str) -> tuple[str, str]:
    """The text, or nothing and what is wrong with it."""
    try:
        return check_text(text), ""
    except ValueError as error:
        return "", str(error)


def int_scalar(value: int, text: str = "", line: int = 0) -> Scalar:
    """A whole number, bad if it does not fit 64 bits."""
    if not -(2**63) <= value < 2**63:
        return Scalar(0, text, line, bad="is beyond the range of 64-bit numbers")
    return Scalar(value, text or str(value), line)


def float_scalar(value: float, text: str = "", line: int = 0) -> Scalar:
    """A number with a fraction, bad if it is not finite."""
    is_finite = value - value == 0.0
    return Scalar(value, text or repr(value), line, bad="" if is_finite else "is not finite")
