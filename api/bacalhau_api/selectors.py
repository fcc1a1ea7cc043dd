"""Label selectors in the Kubernetes syntax: parse, print, and test against labels.

    a=b, c!=d, e in (x,y), f notin (z), g, !h, i>1, j<9

One pass over the text, no backtracking. Values may be double-quoted, so that a label value with
spaces or commas can be named. Where selectors apply (nodes, jobs) is for others to say.
"""

import re
from collections.abc import Mapping
from typing import Final

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.names import check_label_key, check_label_value
from bacalhau_api.v1.job import Constraint

TEXT_LENGTH_MAX: Final = 16 * 1024
CONSTRAINTS_MAX: Final = 256

# Every alternative begins with characters that no other begins with, so a match never backtracks.
_TOKEN = re.compile(r'\s*(?:(==|!=|[=!<>(),])|"((?:[^"\\]|\\.)*)"|([^\s=!<>(),"]+))', re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_PLAIN = re.compile(r'[^\s=!<>(),"]+')
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_INT64 = 2**63

_ONE_VALUE: Final = frozenset({"=", "==", "!=", "gt", "lt"})
_ANY_VALUES: Final = frozenset({"in", "notin"})
_NO_VALUE: Final = frozenset({"exists", "!"})
OPERATORS: Final = ("=", "==", "!=", "in", "notin", "exists", "!", "gt", "lt")
"""All operators, as they are stored."""

_SYNONYMS: Final = {">": "gt", "<": "lt", "doesnotexist": "!"}


def canonical_operator(operator: str) -> str:
    """The stored spelling of an operator: any letter case, and `>`, `<`, `DoesNotExist`, are
    understood. An unknown operator comes back as it is."""
    folded = operator.strip().lower()
    folded = _SYNONYMS.get(folded, folded)
    return folded if folded in OPERATORS else operator


def check_constraint(constraint: Constraint) -> str:
    """What is wrong with a constraint, in words for users; empty if nothing is."""
    operator, count = constraint.operator, len(constraint.values)
    try:
        check_label_key(constraint.key)
        for value in constraint.values:
            check_label_value(value)
    except ValueError as error:
        return str(error)
    if operator in _ONE_VALUE and count != 1:
        return f"the operator {operator} takes exactly one value, this has {count}"
    if operator in _ANY_VALUES and not count:
        return f"the operator {operator} takes at least one value"
    if operator in _NO_VALUE and count:
        return f"the operator {operator} takes no values, this has {count}"
    if operator in ("gt", "lt") and _integer(constraint.values[0]) is None:
        return f"the operator {operator} compares whole numbers, {constraint.values[0]!r} is none"
    if operator not in OPERATORS:
        return f"{operator!r} is not an operator; use one of {', '.join(OPERATORS)}"
    return ""


def parse_selector(text: str) -> tuple[Constraint, ...]:
    """Parse the text form. Empty text selects everything. Raises InvalidError."""
    if len(text) > TEXT_LENGTH_MAX:
        raise _wrong(text[:40], f"a selector has at most {TEXT_LENGTH_MAX} characters")
    tokens = _Tokens(text)
    found: list[Constraint] = []
    while not tokens.is_done:
        if found:
            tokens.expect(",", "between two requirements")
        found.append(_requirement(tokens))
        if len(found) > CONSTRAINTS_MAX:
            raise _wrong(text[:40], f"a selector has at most {CONSTRAINTS_MAX} requirements")
        if problem := check_constraint(found[-1]):
            raise _wrong(text, problem)
    return tuple(found)


def unmet(constraints: tuple[Constraint, ...], labels: Mapping[str, str]) -> tuple[Constraint, ...]:
    """The constraints that these labels do not satisfy; empty if all hold.

    `!=` and `notin` hold where the label is absent; `gt` and `lt` only where both sides are
    integers. A constraint with an operator from the future holds nowhere.
    """
    return tuple(c for c in constraints if not _holds(c, labels))


def describe(constraint: Constraint) -> str:
    """The text form of one constraint; `parse_selector` reads it back."""
    key, operator = constraint.key, constraint.operator
    if operator == "exists":
        return key
    if operator == "!":
        return f"!{key}"
    if operator in _ANY_VALUES:
        values = ",".join(_quoted(v) or '""' for v in constraint.values)
        return f"{key} {operator} ({values})"
    symbol = {"gt": ">", "lt": "<"}.get(operator, operator)
    return f"{key}{symbol}{','.join(_quoted(v) for v in constraint.values)}"


def _holds(constraint: Constraint, labels: Mapping[str, str]) -> bool:
    value = labels.get(constraint.key)
    match constraint.operator:
        case "=" | "==" | "in":
            return value is not None and value in constraint.values
        case "!=" | "notin":
            return value is None or value not in constraint.values
        case "exists":
            return value is not None
        case "!":
            return value is None
        case "gt" | "lt":
            return _compares(constraint, value)
    return False


def _compares(constraint: Constraint, value: str | None) -> bool:
    mine = _integer(value) if value is not None else None
    bound = _integer(constraint.values[0]) if len(constraint.values) == 1 else None
    if mine is None or bound is None:
        return False
    return mine > bound if constraint.operator == "gt" else mine < bound


def _integer(text: str) -> int | None:
    if not _INTEGER.fullmatch(text):
        return None
    number = int(text)
    return number if -_INT64 <= number < _INT64 else None


def _quoted(value: str) -> str:
    if _PLAIN.fullmatch(value) or not value:
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _wrong(text: str, message: str) -> InvalidError:
    shown = text if len(text) <= 80 else text[:79] + "…"
    return InvalidError([Problem("selector", message, repr(shown))])


class _Tokens:
    """The tokens of a selector: (what, is it a symbol)."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._items: list[tuple[str, bool]] = []
        self._at = 0
        position, end = 0, len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise _wrong(text[position:], "a double quote is not closed")
            symbol, quoted, word = match.groups()
            if quoted is not None:
                word = _ESCAPED.sub(r"\1", quoted)
            self._items.append((symbol or word or "", bool(symbol)))
            position = match.end()

    @property
    def is_done(self) -> bool:
        return self._at >= len(self._items)

    @property
    def symbol(self) -> str:
        """The next token if it is a symbol, else empty."""
        return self._items[self._at][0] if not self.is_done and self._items[self._at][1] else ""

    @property
    def word(self) -> str | None:
        """The next token if it is a word, else None."""
        return None if self.is_done or self._items[self._at][1] else self._items[self._at][0]

    def take(self) -> str:
        self._at += 1
        return self._items[self._at - 1][0]

    def expect(self, symbol: str, where: str) -> None:
        if self.symbol != symbol:
            found = "the end" if self.is_done else repr(self._items[self._at][0])
            raise _wrong(self._text, f"expected {symbol!r} {where}, found {found}")
        self.take()

    def key(self) -> str:
        if self.word is None:
            found = "the end" if self.is_done else repr(self._items[self._at][0])
            raise _wrong(self._text, f"expected a label key, found {found}")
        return self.take()


def _requirement(tokens: _Tokens) -> Constraint:
    if tokens.symbol == "!":
        tokens.take()
        return Constraint(key=tokens.key(), operator="!")
    key = tokens.key()
    if tokens.symbol in ("=", "==", "!=", "<", ">"):
        operator = canonical_operator(tokens.take())
        value = "" if tokens.word is None else tokens.take()
        return Constraint(key=key, operator=operator, values=(value,))
    if tokens.word in ("in", "notin"):
        operator = tokens.take()
        return Constraint(key=key, operator=operator, values=_values(tokens))
    return Constraint(key=key, operator="exists")


def _values(tokens: _Tokens) -> tuple[str, ...]:
    """A parenthesised list; an empty place in it is the empty value, as in `(a,)`."""
    tokens.expect("(", "before the values")
    if tokens.symbol == ")":
        tokens.take()
        return ()
    values: list[str] = []
    while True:
        values.append("" if tokens.word is None else tokens.take())
        if tokens.symbol != ",":
            break
        tokens.take()
    tokens.expect(")", "after the values")
    return tuple(dict.fromkeys(values))
