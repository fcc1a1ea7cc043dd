"""What keys mean, and where objects appear."""

import time

import pytest

from bacalhau.storages.objects import Entry, expression, narrowed, select
from bacalhau_api.errors import TerminalError

KEYS = [
    "a", "a/b.csv", "a/b.csv.bak", "a/bc/d.csv", "a/bc/e.txt", "a/c/d.csv", "a/[x].csv",
    "logs/2024-01/1.log", "logs/2024-02/2.log", "logs/2025-01/3.log", "z/",
]  # fmt: skip


def found(key: str, filter_text: str = "") -> dict[str, str]:
    """Paths by key of what is selected of KEYS, as a listing by prefix would have it."""
    selection = select(key)
    listed = [
        Entry(k, 1, "e")
        for k in KEYS
        if (k == key if selection.is_single else k.startswith(selection.prefix))
    ]
    return {e.key: selection.path(e.key) for e in narrowed(listed, selection, filter_text)}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b.csv", {"a/b.csv": "b.csv"}),
        ("a", {"a": "a"}),
        ("a/bc/", {"a/bc/d.csv": "d.csv", "a/bc/e.txt": "e.txt"}),
        ("a/bc/*", {"a/bc/d.csv": "d.csv", "a/bc/e.txt": "e.txt"}),
        (
            "a/b*",
            {
                "a/b.csv": "b.csv", "a/b.csv.bak": "b.csv.bak", "a/bc/d.csv": "bc/d.csv",
                "a/bc/e.txt": "bc/e.txt",
            },
        ),
        ("a/*/d.csv", {"a/bc/d.csv": "bc/d.csv", "a/c/d.csv": "c/d.csv"}),
        ("a/**.csv", {
            "a/b.csv": "b.csv", "a/bc/d.csv": "bc/d.csv", "a/c/d.csv": "c/d.csv",
            "a/[x].csv": "[x].csv",
        }),
        ("a/?.csv", {"a/b.csv": "b.csv"}),
        ("a/[[]x].csv", {"a/[x].csv": "[x].csv"}),
        ("a/[a-b].csv", {"a/b.csv": "b.csv"}),
        ("a/[!a-b]*", {
            "a/c/d.csv": "c/d.csv", "a/[x].csv": "[x].csv",
        }),
        ("logs/2024-*/*.log", {
            "logs/2024-01/1.log": "2024-01/1.log", "logs/2024-02/2.log": "2024-02/2.log",
        }),
        ("logs/2024-*/", {
            "logs/2024-01/1.log": "2024-01/1.log", "logs/2024-02/2.log": "2024-02/2.log",
        }),
        ("z/", {}),
    ],
)  # fmt: skip
def test_keys(key: str, expected: dict[str, str]) -> None:
    assert found(key) == expected


def test_the_whole_bucket() -> None:
    assert found("") == {key: key for key in KEYS if key != "z/"}


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("a/", r"\.csv$", ["a/[x].csv", "a/b.csv", "a/bc/d.csv", "a/c/d.csv"]),
        ("a/", "^bc/", ["a/bc/d.csv", "a/bc/e.txt"]),
        ("logs/2024-", "^nothing", []),
    ],
)
def test_filter_looks_at_what_follows_the_prefix(key: str, text: str, expected: list[str]) -> None:
    assert list(found(key, text)) == expected


@pytest.mark.parametrize("key", ["a/../../etc/passwd", "a//b", "a/./b", "a/" + "x" * 300])
def test_keys_that_would_lead_elsewhere_are_named(key: str) -> None:
    with pytest.raises(TerminalError, match="leave it out with a filter"):
        select("a/").path(key)


def test_what_is_no_regular_expression() -> None:
    with pytest.raises(TerminalError, match=r"params\.filter '\(' is not a regular expression"):
        expression("(", "filter")


@pytest.mark.parametrize("text", [r"(a+)+$", r"(a|a)*b", r"(.*)*x"])
def test_a_hostile_expression_takes_linear_time(text: str) -> None:
    """What takes other engines years: the node's agent must not stand still for it."""
    search = expression(text, "filter").search
    began = time.process_time()
    assert search("a" * 200_000 + "!") is None
    assert time.process_time() - began < 20
