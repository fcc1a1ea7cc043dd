"""Reading: what plain words mean, where things stand, and that hostile input is refused."""

import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import Document, parse_manifests
from bacalhau_api.tree import Fields, Items, Node, Scalar
from bacalhau_api.yamlsafe import (
    ALIASED_VALUES_MAX,
    INPUT_BYTES_MAX,
    VALUES_MAX,
    read_documents,
    resolve_plain,
)


def plain(node: Node) -> object:
    """The values alone."""
    if isinstance(node, Fields):
        return {key: plain(value) for key, value in node.entries.items()}
    if isinstance(node, Items):
        return [plain(value) for value in node.items]
    assert isinstance(node, Scalar)
    return f"bad: {node.bad}" if node.bad else node.value


def read(text: str | bytes) -> list[object]:
    return [plain(node) for node in read_documents(text)]


def refusal(text: str | bytes) -> Problem:
    with pytest.raises(InvalidError) as caught:
        read_documents(text, "job.yaml")
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("No", "No"), ("y", "y"),  # no booleans
        ("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None),
        ("010", "010"), ("0o10", "0o10"), ("0x1F", 31), ("1_000", "1_000"), ("12:30", "12:30"),
        ("2024-01-31", "2024-01-31"), ("-7", -7), ("0", 0), ("-0", 0), ("1.10", 1.1), (".5", 0.5),
        ("1e3", "1e3"), ("1.5e3", "1.5e3"), ("1.5e+3", 1500.0), ("-.5", "-.5"), ("-1.5", -1.5), ("1.", 1.0), ("+1", 1), ("1.2.3", "1.2.3"), (".", "."), ("-", "-"),
        ("0b1", "0b1"), ("=", "="), ("1e", "1e"), ("0o8", "0o8"), ("00", "00"),
        ("9223372036854775807", 2**63 - 1),
    ],
)  # fmt: skip
def test_words_are_numbers_only_where_all_yaml_agrees(written: str, value: object) -> None:
    scalar = resolve_plain(written)
    assert (scalar.value, type(scalar.value), scalar.text) == (value, type(value), written)
    assert not scalar.bad


@pytest.mark.parametrize(
    "written", ["9223372036854775808", "-9223372036854775809", "9" * 9999, "0x" + "f" * 17, ".nan",
                ".inf", "-.INF", "1.0e+999"],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_marked(written: str) -> None:
    scalar = resolve_plain(written)
    assert scalar.bad
    assert scalar.text == written


def test_documents_anchors_and_merges() -> None:
    text = """
base: &base {a: 1, b: 2}
one: {<<: *base, b: 3}
two:
  <<: [{c: 4, a: 5}, *base]
same: *base
quoted: {"<<": x}
---
---
- x
"""
    assert read(text) == [
        {
            "base": {"a": 1, "b": 2},
            "one": {"b": 3, "a": 1},
            "two": {"c": 4, "a": 5, "b": 2},
            "same": {"a": 1, "b": 2},
            "quoted": {"<<": "x"},
        },
        ["x"],
    ]


def test_anchors_do_not_cross_documents() -> None:
    assert "names no anchor above it" in refusal("a: &x 1\n---\nb: *x").message


def test_places_are_those_of_the_text() -> None:
    (root,) = read_documents("a:\n  - b: &x {c d: 1}\n    e: *x\n")
    assert isinstance(root, Fields)
    items = root.entries["a"]
    assert isinstance(items, Items)
    first = items.items[0]
    assert isinstance(first, Fields)
    inner = first.entries["e"]
    assert isinstance(inner, Fields)
    copied = inner.entries["c d"]
    assert (copied.path, copied.line) == ("a[0].e['c d']", 2)
    assert (first.entries["b"].path, first.line) == ("a[0].b", 2)


def test_json_is_read_as_json() -> None:
    assert read('{"a": "\\ud83d\\ude00\\/", "b": [1, 2.5, true, null]} {"c": 1}') == [
        {"a": "\N{GRINNING FACE}/", "b": [1, 2.5, True, None]},
        {"c": 1},
    ]
    assert read('{"n": NaN, "i": -Infinity, "x": 1e999}') == [
        dict.fromkeys("nix", "bad: is not finite")
    ]
    assert read("{a: b, c: [d]}") == [{"a": "b", "c": ["d"]}]  # flow style, not JSON


def test_a_byte_order_mark_and_crlf_are_fine() -> None:
    assert read(b"\xef\xbb\xbfa: 1\r\nb: x\r\n") == [{"a": 1, "b": "x"}]


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        ("", "has no document", ""),
        ("# only a comment\n---\n~\n", "has no document", ""),
        (b"a: \xff", "is not UTF-8", "1"),
        ("a: 1\n".encode("utf-16"), "is not UTF-8", "1"),
        ("x: 1\na: \0", "U+0000", "2"),
        ("a: \x1b[31m", "U+001B", "1"),
        ("a: \ud800", "U+D800", "1"),
        ('a: "\\0"', "NUL", "1"),
        ('{"a": "\\u0000"}', "NUL", ""),
        ('{"a": "\\ud800"}', "surrogate", ""),
        ('{"\\ud800": 1}', "surrogate", ""),
        ('{"a": 1, "a": 2}', "given twice", ""),
        ("a: 1\nb: 2\na: 3", "given twice, first on line 1", "3"),
        ("a: [", "is not valid YAML", "2"),
        ("a: b: c", "is not valid YAML", "1"),
        ("\ta: 1", "is not valid YAML", "1"),
        ("{", "is not valid YAML", "2"),
        ("? [a]\n: b", "a key must be plain text", "1"),
        ("{[a, b]: c}", "a key must be plain text", "1"),
        ("a: !!python/object/apply:os.system [echo]", "!!python/object/apply:os.system", "1"),
        ("!!python/name:os.system x", "tag !!python/name", "1"),
        ("a: !secret x", "'!secret'", "1"),
        ("a: !!binary aGk=", "!!binary", "1"),
        ("a: !!set {x}", "!!set", "1"),
        ("a: !!int x", "does not fit its tag", "1"),
        ("a: !!int true", "does not fit its tag", "1"),
        ("a: &x [*x]", "lies within what it names", "1"),
        ("a: &x {<<: *x}", "lies within what it names", "1"),
        ("a: &x\n  b: &y\n    <<: *x\n  <<: *y", "lies within what it names", "3"),
        ("a: {<<: 1}", "'<<' merges mappings", "1"),
        ("[" * 70 + "]" * 70, "nested deeper than 64", ""),
        ("[" * 100_000, "nested deeper than 64", "1"),
        ('{"a":' * 100_000, "nested deeper than 64", ""),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str | bytes, says: str, line: str) -> None:
    problem = refusal(text)
    assert says in problem.message
    assert problem.where == (f"job.yaml:{line}" if line else "job.yaml") or "nested" in says


def test_tags_that_say_the_obvious_are_fine() -> None:
    text = "a: !!str 5\nb: !!int 5\nc: !!float 5\nd: !!bool true\ne: !!map {x: !!seq [!!null ~]}\nf: ! 5"
    assert read(text) == [{"a": "5", "b": 5, "c": 5, "d": True, "e": {"x": [None]}, "f": "5"}]


def test_size_is_limited_in_bytes_and_the_message_says_so() -> None:
    fits = "a: " + "x" * (INPUT_BYTES_MAX - 3)
    assert len(read_documents(fits)) == 1
    for text in (fits + "x", "a: " + "é" * (INPUT_BYTES_MAX // 2), b"x" * 10_000_000):
        problem = refusal(text)
        assert "at most 1024 KiB" in problem.message
        assert "split it" in problem.hint


def test_the_limits_are_exact() -> None:
    assert len(read_documents("[" + "1," * (VALUES_MAX - 1) + "]")) == 1
    assert f"more than {VALUES_MAX} values" in refusal("[" + "1," * VALUES_MAX + "]").message
    assert f"more than {VALUES_MAX} values" in refusal(json.dumps([[]] * VALUES_MAX)).message
    ten = "a: &a [1,2,3,4,5,6,7,8,9]\nb: ["
    assert len(read_documents(ten + "*a," * (ALIASED_VALUES_MAX // 10) + "]")) == 1
    assert "by aliases" in refusal(ten + "*a," * (ALIASED_VALUES_MAX // 10 + 1) + "]").message
    assert "1000 documents" in refusal("--- a\n" * 1001).message


_HEAD = "apiVersion: bacalhau.org/v1\nkind: Job\nmetadata:\n  name: a\n  labels:\n"
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
)
_TASK = (
    '{"Name":"a","Type":"batch","Tasks":[{"Engine":{"Type":"docker","Params":{"Image":"a"}},%s}]}'
)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: _BOMB, id="billion laughs"),
        pytest.param(lambda: f"a: &a [{'x,' * 5000}]\nb: [{'*a,' * 5000}]", id="quadratic aliases"),
        pytest.param(
            lambda: "a: &a {" + ",".join(f"k{i}: 1" for i in range(5000)) + "}\n"
            + "\n".join(f"b{i}: {{<<: *a}}" for i in range(5000)), id="merges",
        ),
        pytest.param(lambda: _HEAD + "".join(f"    k{i}: v\n" for i in range(1_000_000)), id="1M labels"),
        pytest.param(lambda: _HEAD + "".join(f"    k{i}: v\n" for i in range(9_000)), id="9k labels"),
        pytest.param(lambda: "".join(f"unknown{i}: v\n" for i in range(40_000)), id="unknown keys"),
        pytest.param(lambda: "Name: " + "a" * 1_000_000, id="long name"),
        pytest.param(lambda: "Name: a\n? " + "x" * 900_000, id="long key"),
        pytest.param(lambda: "Name: a\nPriority: " + "9" * 900_000, id="long number"),
        pytest.param(lambda: '{"Name":"a","Count":' + "9" * 900_000 + "}", id="long JSON number"),
        pytest.param(lambda: _TASK % ('"InputSources":[' + ",".join("1" * 400_000) + "]"), id="inputs"),
        pytest.param(lambda: _TASK % ('"InputSources":[' + ",".join("1" * 999) + "]"), id="999 inputs"),
        pytest.param(lambda: _TASK % ('"Env":{' + ",".join(f'"k{i}":1' for i in range(9999)) + "}"), id="env"),
        pytest.param(lambda: "Name: a\nConstraints: '" + "a in (" * 3000 + "'", id="selector"),
        pytest.param(lambda: "--- {}\n" * 150_000, id="documents"),
        pytest.param(lambda: "kind: List\nitems: [" + "{}," * 90_000 + "]", id="list of documents"),
        pytest.param(lambda: "\n".join(" " * i + "a:" for i in range(1000)), id="deep blocks"),
        pytest.param(lambda: "- " * 300_000, id="deep dashes"),
        pytest.param(lambda: "? " * 300_000, id="deep keys"),
        pytest.param(lambda: "\t" * 1_000_000, id="tabs"),
        pytest.param(lambda: "!" + "a" * 900_000 + " x", id="long tag"),
        pytest.param(lambda: "%" * 1_000_000, id="directive"),
    ],
)  # fmt: skip
def test_hostile_input_is_refused_quickly_in_bounded_memory(make: Callable[[], str]) -> None:
    text = make()
    start = time.process_time()
    with pytest.raises(InvalidError) as caught:
        parse_manifests(text, source="job.yaml")
    # The goal is one second; twice that leaves room for a slow machine under load.
    assert time.process_time() - start < 2.0
    assert len(caught.value.problems) <= 21
    assert len(str(caught.value)) < 16_000
    tracemalloc.start()
    try:
        with pytest.raises(InvalidError):
            parse_manifests(text[: INPUT_BYTES_MAX // 8], source="job.yaml")
        assert tracemalloc.get_traced_memory()[1] < 128 * 1024 * 1024
    finally:
        tracemalloc.stop()


# --- Fuzzing: nothing but InvalidError, ever ------------------------------------------------------

_fragments = st.sampled_from(
    ["a", "Name", "kind: Job", ": ", "- ", "\n", "  ", "{", "}", "[", "]", ",", "&a ", "*a", "<<: ", "!!int ",
     "!x ", "|", ">", '"', "'", "\\u", "#", "---", "...", "%YAML 1.1", "~", "1", ".nan", "\t", "\0", "é",
     "\ud800", "apiVersion: bacalhau.org/v1\n", "metadata:\n  name: x\n", "spec: ", "Tasks:\n- ", "? "]
)  # fmt: skip
_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda x: st.one_of(
        st.lists(x, max_size=4), st.dictionaries(st.text(max_size=8), x, max_size=4)
    ),
    max_leaves=20,
)
_KNOWN = st.sampled_from(
    ["Name", "type", "TASKS", "Labels", "Constraints", "Meta", "Count", "Priority", "Namespace", "Job", "State",
     "kind", "apiVersion", "metadata", "spec", "Engine", "Params", "Env", "InputSources", "Source", "Target",
     "ResultPaths", "Resources", "CPU", "Memory", "GPU", "Network", "Ports", "Domains", "Timeouts", "Publisher",
     "EntryModule", "ImportModules", "items", "retry", "status", "Image", "Values", "Operator", "Key", "Alias"]
)  # fmt: skip
_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from(["batch", "ops", "docker", "wasm", "s3", "local", "Job", "Node", "List", "bacalhau.org/v1",
                     "500m", "1Gi", "HTTP", "/data", "x", "in", "a=b", ""]),
)  # fmt: skip
_jobs = st.recursive(
    _LEAVES,
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(_KNOWN, x, max_size=6)),
    max_leaves=30,
)


def outcome(text: str | bytes) -> tuple[Document, ...] | InvalidError:
    try:
        return parse_manifests(text, source="fuzz")
    except InvalidError as error:
        return error


def survives(text: str | bytes) -> None:
    got = outcome(text)
    if isinstance(got, InvalidError):
        assert got.problems
        assert str(got).encode()  # printable: no half surrogates
    else:
        assert got  # nothing is ever passed over in silence
        assert all(document.resource.encode() for document in got)


@given(st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_fuzz_bytes_and_text(data: str | bytes) -> None:
    survives(data)


@given(st.lists(_fragments, max_size=40).map("".join))
def test_fuzz_fragments(text: str) -> None:
    survives(text)


@given(_values)
def test_fuzz_structures(value: object) -> None:
    survives(json.dumps(value))


@given(st.dictionaries(_KNOWN, _jobs, max_size=8))
def test_fuzz_nearly_jobs(value: dict[str, object]) -> None:
    survives(json.dumps(value))
    survives(
        json.dumps({"Name": "a", "Type": "batch", "Tasks": [{"Engine": {"Type": "noop"}, **value}]})
    )
