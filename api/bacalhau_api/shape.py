"""Turns trees into typed objects, guided by the types themselves, and says what is wrong where.

`Shaper.shape` walks a tree along a model's fields: it matches keys (in any letter case for the flat
form), takes text as written, and leaves out nulls. `Shaper.validate` then builds the model. Both
report into `Findings`, with paths and lines as the user wrote them. Rules that need more than one
field are in `rules`.
"""

import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import cache
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.quantity import parse_seconds
from bacalhau_api.tree import Fields, Items, Node, Scalar, is_null, path_of, shown

Loc = tuple[str | int, ...]
"""Where a value stands in the typed object, by wire names: ("spec", "tasks", 0, "engine")."""

PROBLEMS_MAX: Final = 20
ENTRIES_MAX: Final = 10_000
OBJECTS_MAX: Final = 1_000
"""Entries of one list or mapping that are looked at at all, and of one list of mappings; rules set
tighter bounds."""

_M = TypeVar("_M", bound=BaseModel)


class Findings:
    """Collects problems and warnings of one input; problems beyond a bound are only counted."""

    def __init__(self, source: str = "") -> None:
        self.source = source
        self.warnings: list[str] = []
        self._problems: list[tuple[int, Problem]] = []
        self._more = 0

    @property
    def is_full(self) -> bool:
        """True once further problems would not be shown: time to stop looking closely."""
        return len(self._problems) >= PROBLEMS_MAX

    @property
    def count(self) -> int:
        """How many problems there are, those not kept included."""
        return len(self._problems) + self._more

    def add(
        self, node: Node | None, message: str, *, value: str = "", hint: str = "", below: str = ""
    ) -> None:
        """Report a problem at a node, or at a field `below` it that is not there."""
        if self.is_full:
            self._more += 1
            return
        path = node.path if node is not None else ""
        if below:
            path = f"{path}.{below}" if path else below
        line = node.line if node is not None else 0
        where = f"{self.source}:{line}" if line and self.source else self.source
        self._problems.append((line, Problem(path, message, value, hint, where)))

    def warn(self, message: str) -> None:
        """Report something that was understood, but perhaps not as meant."""
        if message not in self.warnings and len(self.warnings) < PROBLEMS_MAX:
            self.warnings.append(message)

    def check(self) -> None:
        """Raise InvalidError if there are problems, in the order of the lines."""
        if not self._problems:
            return
        problems = [p for _, p in sorted(self._problems, key=lambda pair: pair[0])]
        if self._more:
            problems.append(Problem("", f"{self._more} more problems are not shown"))
        raise InvalidError(problems)


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown word: the nearest known one, or all of them if they are few."""
    names = sorted(known)
    folded = {_folded(name): name for name in names}
    if len(word) <= 64:
        import difflib  # only bad input needs it

        close = difflib.get_close_matches(_folded(word), folded, n=1, cutoff=0.6)
        if close:
            return f"did you mean {folded[close[0]]}?"
    return f"use one of {', '.join(names)}" if 0 < len(names) <= 16 else ""


def suggested_by(hint: str) -> str:
    """The word that a hint of `nearest` suggests; empty if it suggests none."""
    return hint[13:-1] if hint.startswith("did you mean ") else ""


def _folded(word: str) -> str:
    return word.lower().replace("_", "").replace("-", "")


# --- What a type asks of the tree -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """How to take a value: `what` is model, list, texts (a text map), text, truth, seconds, free."""

    what: Literal["model", "list", "texts", "text", "truth", "seconds", "free"]
    model: type[BaseModel] | None = None
    item: "Shape | None" = None


_FREE: Final = Shape("free")
_TEXT: Final = Shape("text")


@cache
def shape_of(annotation: Any) -> Shape:
    """The shape of a field's type."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return shape_of(args[0])
    if origin in (typing.Union, types.UnionType):
        rest = [a for a in args if a is not type(None)]
        return shape_of(rest[0]) if len(rest) == 1 else _FREE
    if origin is tuple:
        return Shape("list", item=shape_of(args[0]))
    if origin is dict:
        return Shape("texts") if args == (str, str) else _FREE
    if origin is Literal:
        return _TEXT if all(isinstance(a, str) for a in args) else _FREE
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return Shape("model", model=annotation)
        if issubclass(annotation, str | Enum | datetime):
            return _TEXT
        if issubclass(annotation, bool):
            return Shape("truth")
    return _FREE


@cache
def fields_of(model: type[BaseModel]) -> Mapping[str, Shape]:
    """Wire name to shape, for all fields of a model."""
    found: dict[str, Shape] = {}
    for name, info in model.model_fields.items():
        wire = info.alias or name
        annotation: Any = info.annotation
        shape = shape_of(annotation)
        is_number = shape is _FREE and wire.endswith(("Seconds", "SecondsMax", "Timeout"))
        found[wire] = Shape("seconds") if is_number else shape
    return found


@cache
def _folded_names(model: type[BaseModel]) -> Mapping[str, str]:
    return {name.lower(): name for name in fields_of(model)}


Special = Callable[["Shaper", Node, Loc], Any]
"""Takes over a field or type whose written form differs from its stored form."""


@dataclass(slots=True)
class Shaper:
    """One walk over one document. `special` is keyed by (model, wire name) or by model;
    `is_flat` says that missing fields are named as the flat form spells them; `misspelt` has the
    places of fields that unknown ones seem to mean, which need not be said to be missing too."""

    findings: Findings
    ignore_case: bool = False
    is_flat: bool = False
    special: Mapping[object, Special] = field(default_factory=dict)
    origins: dict[Loc, Node] = field(default_factory=dict)
    refused: set[Loc] = field(default_factory=set)
    misspelt: set[Loc] = field(default_factory=set)

    def shape(self, node: Node, shape: Shape, loc: Loc = ()) -> Any:
        """Plain data (JSON types) for the value at `loc`; what cannot be is reported."""
        self.origins[loc] = node
        most = OBJECTS_MAX if shape.item and shape.item.model else ENTRIES_MAX
        if shape.what in ("list", "texts") and self._is_too_long(node, loc, most):
            return None
        if shape.model is not None:
            take = self.special.get(shape.model)
            return take(self, node, loc) if take else self.shape_model(node, shape.model, loc)
        if shape.what == "list" and isinstance(node, Items) and shape.item is not None:
            return [self.shape(x, shape.item, (*loc, i)) for i, x in enumerate(node.items)]
        if shape.what == "texts" and isinstance(node, Fields):
            return {k: self._text(v, (*loc, k)) for k, v in node.entries.items()}
        if isinstance(node, Scalar):
            return self._scalar(node, shape, loc)
        return self.plain(node, loc)

    def _is_too_long(self, node: Node, loc: Loc, most: int) -> bool:
        count = len(node.items) if isinstance(node, Items) else 0
        count = len(node.entries) if isinstance(node, Fields) else count
        if count > most:
            self.refuse(node, loc, f"has {count} entries, at most {most} are allowed")
        return count > most

    def shape_model(self, node: Node, model: type[BaseModel], loc: Loc) -> Any:
        """As `shape`, for a mapping that holds a model's fields."""
        self.origins[loc] = node
        if not isinstance(node, Fields):
            return self.plain(node, loc)
        shapes, found = fields_of(model), {}
        for key, value in node.entries.items():
            name = self._match(key, model)
            if name is None:
                self._unknown(value, key, model, loc)
            elif name in found:
                self.findings.add(value, f"is given twice: {name} in another letter case")
            elif not is_null(value):
                found[name] = self._field(value, model, name, shapes[name], (*loc, name))
            else:
                self.origins[(*loc, name)] = value
        return {name: value for name, value in found.items() if value is not None}

    def _field(self, node: Node, model: type, name: str, shape: Shape, loc: Loc) -> Any:
        self.origins[loc] = node
        take = self.special.get((model, name))
        return take(self, node, loc) if take else self.shape(node, shape, loc)

    def _match(self, key: str, model: type[BaseModel]) -> str | None:
        if key in fields_of(model):
            return key
        return _folded_names(model).get(key.lower()) if self.ignore_case else None

    def _unknown(self, node: Node, key: str, model: type[BaseModel], loc: Loc) -> None:
        if self.findings.is_full:
            self.findings.add(node, "")  # only counted
            return
        hint = nearest(key, fields_of(model))
        self.misspelt.add((*loc, suggested_by(hint)))
        self.findings.add(node, "is not a known field", hint=hint)

    def refuse(
        self, node: Node, loc: Loc, message: str, *, value: str = "", hint: str = ""
    ) -> None:
        """Report a problem at `loc`, once: what validation would add there is left out."""
        self.refused.add(loc)
        self.findings.add(node, message, value=value, hint=hint)

    def plain(self, node: Node, loc: Loc) -> Any:
        """Free-form data as it is."""
        self.origins[loc] = node
        if isinstance(node, Fields):
            return {k: self.plain(v, (*loc, k)) for k, v in node.entries.items()}
        if isinstance(node, Items):
            return [self.plain(x, (*loc, i)) for i, x in enumerate(node.items)]
        assert isinstance(node, Scalar)
        if node.bad:
            self.refuse(node, loc, node.bad, value=shown(node) if node.text else "")
            return None
        return node.value

    def _text(self, node: Node, loc: Loc) -> Any:
        """The value of a text map: whatever scalar it is, as it was written."""
        self.origins[loc] = node
        if is_null(node):
            self.refuse(node, loc, "has no value", hint='write "" for an empty one')
            return ""
        if isinstance(node, Scalar) and _has_text(node):
            return node.text
        return self.plain(node, loc)

    def _scalar(self, node: Scalar, shape: Shape, loc: Loc) -> Any:
        if shape.what == "text" and node.value is not None and _has_text(node):
            return node.text
        if shape.what == "truth" and node.text.lower() in ("true", "false"):
            return node.text.lower() == "true"
        if shape.what == "seconds" and isinstance(node.value, str) and not node.bad:
            return self._seconds(node, loc)
        return self.plain(node, loc)

    def _seconds(self, node: Scalar, loc: Loc) -> Any:
        try:
            exact = parse_seconds(node.text)
        except ValueError as error:
            self.refuse(node, loc, str(error), value=shown(node))
            return None
        return int(exact) if exact.denominator == 1 else float(exact)

    # --- Validation -------------------------------------------------------------------------------

    def validate(self, data: object, model: type[_M], base: Loc = ()) -> _M | None:
        """Build the model from shaped data that stands at `base`; None if it cannot be."""
        try:
            return model.model_validate_json(json.dumps(data))
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=True, include_input=True):
                self._report(detail, base)
            return None

    def node_at(self, loc: Loc) -> tuple[Node | None, Loc]:
        """The node at `loc`, or the nearest one above it with the rest of the path."""
        for end in range(len(loc), -1, -1):
            if (node := self.origins.get(loc[:end])) is not None:
                return node, loc[end:]
        return None, loc

    def _report(self, detail: Any, base: Loc) -> None:
        loc: Loc = (*base, *detail["loc"])
        if self.findings.is_full:
            self.findings.add(None, "")  # only counted
            return
        if any(loc[:end] in self.refused for end in range(len(loc) + 1)):
            return
        node, rest = self.node_at(loc)
        if detail["type"] == "too_short" and isinstance(node, Items) and node.items:
            return  # it has entries, each wrong, and reported as such
        message, hint = _worded(detail)
        if detail["type"] == "missing":
            if loc not in self.misspelt:
                self.findings.add(node, message, below=self.name_of(rest), hint=hint)
            return
        value = "" if node is None or _is_secret(loc, node) else shown(node)
        self.findings.add(node, message, value=value, hint=hint)

    def name_of(self, rest: Loc) -> str:
        """A field that is not there, as the user would write it."""
        if not self.is_flat:
            return path_of(rest)
        # The flat form has no `spec` and `metadata`, and spells its names Like This.
        names = [x for x in rest if x not in ("spec", "metadata")]
        return path_of([x[:1].upper() + x[1:] if isinstance(x, str) else x for x in names])


def _has_text(node: Scalar) -> bool:
    return bool(node.text) or not node.bad


def _is_secret(loc: Loc, node: Node) -> bool:
    """Environments hold passwords, and so do some URLs."""
    if "env" in loc or "environmentVariables" in loc:
        return True
    return isinstance(node, Scalar) and "://" in node.text and bool(set("@?") & set(node.text))


def _worded(detail: Any) -> tuple[str, str]:
    """pydantic's finding in the words of this project: (message, hint)."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _WORDS:
        return _WORDS[kind].format(**context), ""
    if kind in ("enum", "literal_error"):
        options = [x.strip("'") for x in context["expected"].replace(" or ", ", ").split(", ")]
        given = detail["input"]
        hint = nearest(given, options) if isinstance(given, str) else ""
        message = (
            f"must be one of {', '.join(options)}"
            if len(options) > 1
            else (f"must be {options[0]}")
        )
        return message, hint if hint.startswith("did") else ""
    message = detail["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:], ""


_WORDS: Final = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 64 bits",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_long": "has {actual_length} entries, at most {max_length} are allowed",
    "too_short": "has {actual_length} entries, at least {min_length} are needed",
    "extra_forbidden": "is not a known field",
}
