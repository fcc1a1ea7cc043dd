"""Selectors: the Kubernetes syntax, its semantics, and linear time on hostile text."""

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api.errors import InvalidError
from bacalhau_api.selectors import (
    OPERATORS,
    canonical_operator,
    check_constraint,
    describe,
    parse_selector,
    unmet,
)
from bacalhau_api.v1.job import Constraint

LABELS = {"a": "b", "region": "eu", "gpu": "", "cores": "16", "text": "a, b"}


def c(key: str, operator: str, *values: str) -> Constraint:
    return Constraint(key=key, operator=operator, values=values)


def test_every_form_is_parsed() -> None:
    assert parse_selector(" a=b,c!=d , e in (x,y),f notin ( z ),g,!h,i>1,j<9,k==v") == (
        c("a", "=", "b"), c("c", "!=", "d"), c("e", "in", "x", "y"), c("f", "notin", "z"),
        c("g", "exists"), c("h", "!"), c("i", "gt", "1"), c("j", "lt", "9"), c("k", "==", "v"),
    )  # fmt: skip


def test_empty_text_selects_everything() -> None:
    assert parse_selector("") == parse_selector(" \n") == ()


def test_empty_values_and_odd_words() -> None:
    assert parse_selector("a=") == (c("a", "=", ""),)
    assert parse_selector("a in (x,)") == (c("a", "in", "x", ""),)
    assert parse_selector("in in (in,notin)") == (c("in", "in", "in", "notin"),)
    assert parse_selector("a=in") == (c("a", "=", "in"),)
    assert parse_selector('t="a, \\"b\\""') == (c("t", "=", 'a, "b"'),)
    assert parse_selector("example.org/zone-1=x_y") == (c("example.org/zone-1", "=", "x_y"),)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a=b", True), ("a==b", True), ("a=x", False), ("none=b", False),
        ("a!=x", True), ("a!=b", False), ("none!=b", True),  # holds where the label is absent
        ("a in (x,b)", True), ("none in (b)", False),
        ("a notin (x)", True), ("a notin (b)", False), ("none notin (b)", True),
        ("a", True), ("gpu", True), ("none", False),
        ("!none", True), ("!a", False),
        ("cores>15", True), ("cores>16", False), ("cores<17", True), ("cores<16", False),
        ("a>1", False), ("a<1", False), ("none>0", False), ("none<9", False),
        ("cores>-1", True), ('text="a, b"', True), ("gpu=", True),
    ],
)  # fmt: skip
def test_semantics(text: str, holds: bool) -> None:
    constraints = parse_selector(text)
    assert unmet(constraints, LABELS) == (() if holds else constraints)


def test_unmet_gives_those_that_fail_in_order() -> None:
    constraints = parse_selector("x,a=b,y")
    assert unmet(constraints, LABELS) == (c("x", "exists"), c("y", "exists"))


def test_an_operator_from_the_future_holds_nowhere() -> None:
    assert unmet((c("a", "near", "b"),), LABELS) == (c("a", "near", "b"),)


@pytest.mark.parametrize(
    "value", ["9" * 19, "1.5", "0x10", "\N{ARABIC-INDIC DIGIT ONE}", "", "1e3"]
)
def test_labels_that_are_no_64_bit_integers_do_not_compare(value: str) -> None:
    assert unmet(parse_selector("n>0,n<9"), {"n": value})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,,b", "expected a label key"), (",", "expected a label key"), ("a,", "expected a label key"),
        ("=b", "expected a label key"), ("!", "expected a label key"), ("a b", "expected ','"),
        ("a in x", r"expected '\('"), ("a in (x", r"expected '\)'"), ("a in ()", "at least one"),
        ("a>x", "whole numbers"), ("a>", "whole numbers"), ('a="x', "not closed"), ("a=b=c", "expected ','"),
        ('""=x', "empty"), ('"a b"=x', "may not contain"), ("a" * 300 + "=x", "at most 253"),
        ("a=" + "x" * 300, "at most 256"), ("a in (" + "x," * 20_000, "16384"),
        (",".join(["a"] * 300), "at most 256"), ("a>99999999999999999999", "whole numbers"),
    ],
)  # fmt: skip
def test_wrong_selectors_are_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidError, match=says) as caught:
        parse_selector(text)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        "a in (" * 2700,
        '"\\' * 8000,
        " " * 16_000 + "(",
        "!" * 16_000,
        "a" * 16_000,
        '"' + "\\a" * 8000,
    ],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    start = time.process_time()  # of others' work on the machine it knows nothing
    with pytest.raises(InvalidError):
        parse_selector(text)
    assert time.process_time() - start < 0.5


_values = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=10)
_keys = st.text(st.sampled_from("abcZ019._/-é"), min_size=1, max_size=8)


@given(
    st.lists(
        st.one_of(
            st.builds(c, _keys, st.sampled_from(["=", "==", "!="]), _values),
            st.builds(
                lambda k, o, v: c(k, o, *v),
                _keys,
                st.sampled_from(["in", "notin"]),
                st.lists(_values, min_size=1, max_size=3, unique=True),
            ),
            st.builds(c, _keys, st.sampled_from(["exists", "!"])),
            st.builds(c, _keys, st.sampled_from(["gt", "lt"]), st.integers(-99, 99).map(str)),
        ),
        max_size=4,
    )
)
def test_what_is_described_is_parsed_back(constraints: list[Constraint]) -> None:
    text = ",".join(describe(x) for x in constraints)
    assert parse_selector(text) == tuple(constraints)


@given(st.text(st.sampled_from('ab =!<>(),"\\in\x00\ud800é'), max_size=40))
def test_any_text_is_a_selector_or_invalid(text: str) -> None:
    parsed: tuple[Constraint, ...] = ()
    with contextlib.suppress(InvalidError):
        parsed = parse_selector(text)
    for constraint in parsed:
        assert check_constraint(constraint) == ""
        assert constraint.operator in OPERATORS


def test_operators_are_known_by_other_names_too() -> None:
    assert [canonical_operator(x) for x in ("In", "NotIn", "Exists", "DoesNotExist", ">", " LT ")] == [
        "in", "notin", "exists", "!", "gt", "lt",
    ]  # fmt: skip
    assert canonical_operator("near") == "near"


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (c("a", "near", "x"), "is not an operator; use one of =, =="),
        (c("a", "=", "x", "y"), "exactly one value, this has 2"),
        (c("a", "exists", "x"), "takes no values"),
        (c("a", "in"), "at least one value"),
    ],
)
def test_constraints_are_checked(constraint: Constraint, says: str) -> None:
    assert says in check_constraint(constraint)
