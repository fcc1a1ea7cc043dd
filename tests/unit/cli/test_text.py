"""What reaches a terminal."""

from datetime import timedelta

import pytest

from bacalhau.cli.text import clean, clean_lines, duration, size, table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ünïcode 漢字", "plain ünïcode 漢字"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("a\x1b]8;;http://evil\x07link\x1b]8;;\x07", "a]8;;http://evillink]8;;"),
        ("two\nlines", "two lines"),
        ("back\x08space\rreturn\x9b2J", "backspacereturn2J"),
        ("\u202eevil\u2066", "evil"),
        ("a\u200bb\ufeff", "ab"),
        ("half \ud800", "half "),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_clean_lines_keeps_lines_and_tabs() -> None:
    assert clean_lines("a\tb\nc\x1b[2J\r\n\u202e") == "a\tb\nc[2J\n"


def test_table_aligns() -> None:
    assert table(["A", "LONG"], [["xyz", "1"], ["", "\x1b22"]]) == [
        "A    LONG",
        "xyz  1",
        "     22",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m"), (61, "1m1s"), (3599, "59m"), (3600, "1h"),
     (3660, "1h1m"), (86400 * 3 + 3600 * 4, "3d4h"), (86400 * 40, "40d")],
)  # fmt: skip
def test_duration(seconds: int, text: str) -> None:
    assert duration(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (None, "-")],
)
def test_size(count: object, text: str) -> None:
    assert size(count) == text
