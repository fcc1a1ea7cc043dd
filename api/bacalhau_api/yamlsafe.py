"""Reads YAML and JSON that may be hostile, in bounded time and memory, into trees with lines.

Every limit is a constant here. An unquoted word is a number or a boolean only where YAML 1.1 and
1.2 agree that it is, so `on`, `no`, `010`, `1_000`, `1e3` and `12:30` stay text, and what any YAML
writer wrote as text is read as text. Tags that build objects are refused; aliases and merge keys
work within a small budget. What the values mean is for others (`shape`).
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NoReturn

import yaml

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.names import check_text
from bacalhau_api.tree import (
    DEPTH_MAX,
    Fields,
    Items,
    Node,
    Plain,
    Scalar,
    float_scalar,
    int_scalar,
    path_of,
    shorten,
)

INPUT_BYTES_MAX: Final = 1024 * 1024
"""One input, all its documents together."""

DOCUMENTS_MAX: Final = 1000
"""Documents of one input."""

VALUES_MAX: Final = 100_000
"""Values (mappings, lists, scalars) in one input."""

ALIASED_VALUES_MAX: Final = 10_000
"""Values that aliases and merge keys add by repeating what stands elsewhere."""

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FORBIDDEN = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\ud800-\udfff\ufffe\uffff]")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"(?:[-+]?[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS: Final[Mapping[str, Plain]] = {"": None, "~": None} | {
    spelling: value
    for word, value in (("null", None), ("true", True), ("false", False))
    for spelling in (word, word.capitalize(), word.upper())
}
_CORE: Final = "tag:yaml.org,2002:"
_SCALAR_TAGS: Final[dict[str, type | tuple[type, ...]]] = {
    f"{_CORE}int": int, f"{_CORE}float": (int, float), f"{_CORE}bool": bool,
    f"{_CORE}null": type(None),
}  # fmt: skip
_JSON_SPACE = re.compile(r"[ \t\r\n]*")


def read_documents(text: str | bytes, source: str = "<input>") -> list[Node]:
    """All documents of a YAML stream, or of JSON texts one after another; empty ones left out.

    Raises InvalidError, with `source` and line, for what is malformed, too large, too deep, or
    empty altogether.
    """
    checked = _checked_text(text, source)
    documents = _read_json(checked, source) if checked.lstrip()[:1] in ("{", "[") else None
    if documents is None:
        documents = []
        for document in _YamlReader(source).documents(checked):
            if len(documents) == DOCUMENTS_MAX:
                _refuse(source, document.line, f"has more than {DOCUMENTS_MAX} documents")
            documents.append(document)
    if not documents:
        _refuse(source, 0, "has no document: the input is empty", hint="write a manifest")
    return documents


def resolve_plain(text: str, line: int = 0) -> Scalar:
    """What an unquoted YAML scalar means."""
    if text in _CONSTANTS:
        return Scalar(_CONSTANTS[text], text, line)
    if text[0] not in "+-.0123456789":
        return Scalar(text, text, line)
    if _NOT_FINITE.fullmatch(text):
        return Scalar(text, text, line, bad="is not finite")
    if _INT.fullmatch(text):
        return int_scalar(int(text) if len(text) <= 20 else 2**64, text, line)
    if _HEX.fullmatch(text):
        return int_scalar(int(text, 16) if len(text) <= 20 else 2**64, text, line)
    if len(text) <= 400 and _FLOAT.fullmatch(text):
        return float_scalar(float(text), text, line)
    return Scalar(text, text, line)


def _refuse(source: str, line: int, message: str, *, hint: str = "", field: str = "") -> NoReturn:
    where = f"{source}:{line}" if line else source
    raise InvalidError([Problem(field, message, hint=hint, where=where)])


def _check_scalar(text: str, source: str, line: int, field: str = "") -> str:
    """Escapes can spell what the text itself may not hold."""
    try:
        return check_text(text)
    except ValueError as error:
        _refuse(source, line, str(error), field=field)


def _checked_text(text: str | bytes, source: str) -> str:
    """The text, decoded, within the size limit, and free of what neither language allows."""
    if len(text) > INPUT_BYTES_MAX:
        _refuse_size(source, len(text))
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            _refuse(source, line, "is not UTF-8 text", hint="save the file as UTF-8")
    text = text.removeprefix("\ufeff")
    if found := _FORBIDDEN.search(text):
        line = text.count("\n", 0, found.start()) + 1
        _refuse(source, line, f"contains the character U+{ord(found[0]):04X}; remove it")
    if len(text) * 4 > INPUT_BYTES_MAX and (size := len(text.encode())) > INPUT_BYTES_MAX:
        _refuse_size(source, size)
    return text


def _refuse_size(source: str, size_bytes: int) -> NoReturn:
    limit = f"{INPUT_BYTES_MAX // 1024} KiB"
    hint = "split it, or keep large data in an input source instead of the manifest"
    _refuse(source, 0, f"has {size_bytes} bytes, at most {limit} are read", hint=hint)


class _Budget:
    """Counts what is built, so that a small input cannot make a large tree."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._values = 0
        self._aliased = 0

    def spend(self, depth: int, line: int, *, is_aliased: bool = False) -> None:
        self._values += 1
        self._aliased += is_aliased
        if depth > DEPTH_MAX:
            _refuse(self._source, line, f"is nested deeper than {DEPTH_MAX} levels")
        if self._values > VALUES_MAX:
            _refuse(self._source, line, f"has more than {VALUES_MAX} values")
        if self._aliased > ALIASED_VALUES_MAX:
            hint = "write the values out"
            message = f"repeats more than {ALIASED_VALUES_MAX} values by aliases"
            _refuse(self._source, line, message, hint=hint)


# --- JSON -----------------------------------------------------------------------------------------


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as the list of its members, so that none given twice gets lost."""


def _read_json(text: str, source: str) -> list[Node] | None:
    """The documents if all of the text is JSON, else None: it may still be YAML in flow style."""
    numbers = itertools.count()

    def count() -> None:
        if next(numbers) > VALUES_MAX:  # before a long list of them is built
            _refuse(source, 0, f"has more than {VALUES_MAX} values")

    def whole(written: str) -> Scalar:
        count()
        return int_scalar(int(written) if len(written) <= 20 else 2**64, written)

    def real(written: str) -> Scalar:
        count()
        return float_scalar(float(written) if len(written) <= 400 else math.inf, written)

    decoder = json.JSONDecoder(
        object_pairs_hook=_Pairs,
        parse_int=whole,
        parse_float=real,
        parse_constant=lambda word: Scalar(word, word, bad="is not finite"),
    )
    found: list[Any] = []
    position = _skip_space(text, 0)
    try:
        while position < len(text):
            if len(found) == DOCUMENTS_MAX:
                _refuse(source, 0, f"has more than {DOCUMENTS_MAX} documents")
            value, position = decoder.raw_decode(text, position)
            found.append(value)
            position = _skip_space(text, position)
    except ValueError:
        return None
    except RecursionError:
        _refuse(source, 0, f"is nested deeper than {DEPTH_MAX} levels")
    budget = _Budget(source)
    return [_json_node(value, source, budget, ()) for value in found if value is not None]


def _skip_space(text: str, position: int) -> int:
    match = _JSON_SPACE.match(text, position)
    return match.end() if match else position


def _json_node(value: Any, source: str, budget: _Budget, keys: tuple[str | int, ...]) -> Node:
    budget.spend(len(keys), 0)
    if isinstance(value, _Pairs):
        fields = Fields()
        for key, member in value:
            _check_scalar(key, source, 0, path_of(keys))
            if key in fields.entries:
                _refuse(source, 0, "is given twice", field=path_of((*keys, key)))
            fields.put(key, _json_node(member, source, budget, (*keys, key)))
        return fields
    if isinstance(value, list):
        items = Items()
        for index, item in enumerate(value):
            items.add(_json_node(item, source, budget, (*keys, index)))
        return items
    if isinstance(value, Scalar):
        return value
    if isinstance(value, str):
        return Scalar(_check_scalar(value, source, 0, path_of(keys)), value)
    return Scalar(value, {None: "", True: "true", False: "false"}[value])


# --- YAML -----------------------------------------------------------------------------------------


class _Open:
    """A mapping or list that is being read, with the anchors that name it."""

    __slots__ = ("anchor", "is_merging", "key", "merges", "node")

    def __init__(self, node: Fields | Items, anchor: str | None) -> None:
        self.node = node
        self.anchor = anchor
        self.key: str | None = None
        self.is_merging = False
        self.merges: list[Node] = []


class _YamlReader:
    """Builds trees from the parser's events, one at a time, so that limits bite early."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._budget = _Budget(source)
        self._anchors: dict[str, Node] = {}
        self._stack: list[_Open] = []
        self._root: Node | None = None

    def documents(self, text: str) -> Iterator[Node]:
        """Yield the documents that hold anything."""
        try:
            for event in yaml.parse(text, Loader=_LOADER):
                self._take(event)
                if isinstance(event, yaml.DocumentEndEvent) and self._root is not None:
                    root, self._root = self._root, None
                    if not (isinstance(root, Scalar) and root.value is None):
                        yield root
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            reason = ", ".join(x for x in (error.context, error.problem) if x)
            self._refuse(mark.line + 1 if mark else 0, f"is not valid YAML: {reason}")
        except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
            first_line = str(error).split("\n", 1)[0]
            self._refuse(0, f"is not valid YAML: {first_line}")

    def _refuse(self, line: int, message: str, *, hint: str = "") -> NoReturn:
        keys: list[str | int] = []
        for frame in self._stack:
            if isinstance(frame.node, Items):
                keys.append(len(frame.node.items))
            elif frame.key is not None:
                keys.append(frame.key)
        _refuse(self._source, line, message, hint=hint, field=path_of(keys))

    def _take(self, event: yaml.Event) -> None:
        line = event.start_mark.line + 1 if event.start_mark else 0
        handler = _HANDLERS.get(type(event))
        if handler is not None:
            handler(self, event, line)

    def _on_document(self, event: Any, line: int) -> None:
        self._anchors.clear()
        self._root = None

    def _on_scalar(self, event: Any, line: int) -> None:
        self._budget.spend(len(self._stack), line)
        try:
            check_text(event.value)
        except ValueError as error:
            self._refuse(line, str(error))
        node = self._scalar(event, line)
        is_merge = event.value == "<<" and event.implicit[0] and event.tag is None
        self._place(node, event.anchor, line, is_merge=is_merge)

    def _on_start(self, event: Any, line: int) -> None:
        self._budget.spend(len(self._stack), line)
        is_map = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", _CORE + ("map" if is_map else "seq")):
            self._refuse_tag(event.tag, line)
        self._stack.append(_Open(Fields(line) if is_map else Items(line), event.anchor))
        if event.anchor is not None:
            self._anchors[event.anchor] = self._stack[-1].node

    def _on_end(self, event: Any, line: int) -> None:
        frame = self._stack.pop()
        if isinstance(frame.node, Fields):
            for merged in frame.merges:
                self._merge(frame.node, merged, line)
        self._place(frame.node, frame.anchor, line)

    def _on_alias(self, event: Any, line: int) -> None:
        target = self._anchors.get(event.anchor)
        if target is None:
            self._refuse(line, f"the alias *{shorten(event.anchor)} names no anchor above it")
        if any(frame.node is target for frame in self._stack):
            self._refuse(line, f"the alias *{shorten(event.anchor)} lies within what it names")
        self._place(self._copy(target, len(self._stack)), None, line)

    def _place(self, node: Node, anchor: str | None, line: int, *, is_merge: bool = False) -> None:
        """Put a complete value where it belongs: as the root, an item, a key, or a key's value."""
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._stack:
            self._root = node
            return
        frame = self._stack[-1]
        if isinstance(frame.node, Items):
            frame.node.add(node)
        elif frame.is_merging:
            frame.merges.append(node)
            frame.is_merging = False
        elif is_merge and frame.key is None:
            frame.is_merging = True
        elif frame.key is None:
            self._place_key(frame, frame.node, node, line)
        else:
            frame.node.put(frame.key, node)
            frame.key = None

    def _place_key(self, frame: _Open, fields: Fields, node: Node, line: int) -> None:
        if not isinstance(node, Scalar):
            self._refuse(line, "a key must be plain text, not a list or a mapping")
        if node.text in fields.entries:
            where = fields.entries[node.text].line
            frame.key = node.text
            self._refuse(line, f"is given twice, first on line {where}")
        frame.key = node.text

    def _merge(self, into: Fields, merged: Node, line: int) -> None:
        """`<<`: add what the mapping does not say itself. Of several, the first wins."""
        sources = merged.items if isinstance(merged, Items) else [merged]
        for source in sources:
            if not isinstance(source, Fields):
                self._refuse(line, "'<<' merges mappings; its value must be one, or a list of them")
            for key, node in source.entries.items():
                if key not in into.entries:
                    into.put(key, node)

    def _copy(self, node: Node, depth: int) -> Node:
        """A copy to stand at another place, paid from the budget for aliases."""
        self._budget.spend(depth, node.line, is_aliased=True)
        if isinstance(node, Fields):
            fields = Fields(node.line)
            for key, value in node.entries.items():
                fields.put(key, self._copy(value, depth + 1))
            return fields
        if isinstance(node, Items):
            items = Items(node.line)
            for value in node.items:
                items.add(self._copy(value, depth + 1))
            return items
        assert isinstance(node, Scalar)
        return Scalar(node.value, node.text, node.line, node.bad)

    def _scalar(self, event: Any, line: int) -> Scalar:
        text: str = event.value
        if event.tag is None or event.tag == "!":
            if event.tag is None and event.implicit[0]:
                return resolve_plain(text, line)
            return Scalar(text, text, line)
        if event.tag == f"{_CORE}str":
            return Scalar(text, text, line)
        wanted = _SCALAR_TAGS.get(event.tag)
        if wanted is None:
            self._refuse_tag(event.tag, line)
        node = resolve_plain(text, line)
        is_bool = isinstance(node.value, bool)
        if not isinstance(node.value, wanted) or is_bool != (wanted is bool):
            self._refuse(line, f"{shorten(text)} does not fit its tag {_tag_text(event.tag)}")
        return node

    def _refuse_tag(self, tag: str, line: int) -> NoReturn:
        message = f"the tag {_tag_text(tag)} is not allowed"
        self._refuse(line, message, hint="write plain values: text, numbers, lists, mappings")


_HANDLERS: Final[dict[type, Callable[[_YamlReader, Any, int], None]]] = {
    yaml.DocumentStartEvent: _YamlReader._on_document,
    yaml.ScalarEvent: _YamlReader._on_scalar,
    yaml.MappingStartEvent: _YamlReader._on_start,
    yaml.SequenceStartEvent: _YamlReader._on_start,
    yaml.MappingEndEvent: _YamlReader._on_end,
    yaml.SequenceEndEvent: _YamlReader._on_end,
    yaml.AliasEvent: _YamlReader._on_alias,
}


def _tag_text(tag: str) -> str:
    cut = tag[:60]
    return f"!!{cut.removeprefix(_CORE)}" if tag.startswith(_CORE) else shorten(cut)
