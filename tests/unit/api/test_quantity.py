"""CPU, bytes, devices and durations: what is read, and that what is printed reads back."""

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau_api.quantity import (
    format_bytes,
    format_cpu,
    format_seconds,
    from_quantities,
    parse_bytes,
    parse_cpu,
    parse_gpu,
    parse_seconds,
    to_quantities,
)


@pytest.mark.parametrize(
    ("text", "millis"),
    [("500m", 500), ("0.5", 500), ("2", 2000), (".1", 100), ("0.1239", 123), (" 2 \n", 2000),
     ("1.", 1000), ("0", 0), ("", 0), ("500M", 500)],
)  # fmt: skip
def test_cpu_is_read(text: str, millis: int) -> None:
    assert parse_cpu(text) == millis


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512Mb", 512_000_000),  # decimal mega, not milli and not 2**20
        ("512m", 512_000_000),
        ("1Gi", 2**30), ("1gib", 2**30), ("1 GiB", 2**30), ("1g", 10**9), ("10", 10), ("10b", 10),
        ("1.5k", 1500), ("0.5Ki", 512), ("7Ei", 7 * 2**60), ("9eb", 9 * 10**18), ("1.9", 1), ("", 0),
        ("2TIB", 2 * 2**40), ("3pb", 3 * 10**15),
    ],
)  # fmt: skip
def test_bytes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("parse", "text", "says"),
    [
        (parse_cpu, "half", "500m"),
        (parse_cpu, "-1", "negative"),
        (parse_cpu, "0.0001", "less than one millicore"),
        (parse_cpu, "1e3", "500m"),
        (parse_cpu, "0.5m", "500m"),
        (parse_cpu, "9" * 40, "more than"),
        (parse_cpu, "1" * 300, "not a quantity"),
        (parse_bytes, "1x", "unknown unit 'x'"),
        (parse_bytes, "1mm", "unknown unit"),
        (parse_bytes, "8Ei", "8 EiB"),
        (parse_bytes, "-1", "negative"),
        (parse_bytes, "1\N{KELVIN SIGN}", "not a quantity"),
        (parse_bytes, "Gi", "512Mi"),
        (parse_gpu, "1.5", "whole number"),
        (parse_gpu, "\N{ARABIC-INDIC DIGIT ONE}", "not a quantity"),
        (parse_gpu, "-1", "negative"),
        (parse_seconds, "soon", "90s"),
        (parse_seconds, "1h30", "1h30m"),
        (parse_seconds, "", "90s"),
        (parse_seconds, "-5s", "negative"),
    ],
)
def test_nonsense_is_refused_with_an_example(parse: object, text: str, says: str) -> None:
    assert callable(parse)
    with pytest.raises(ValueError, match=says):
        parse(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("500ms", Fraction(1, 2)),
        ("2d", 172800),
    ],
)
def test_durations_are_read(text: str, seconds: Fraction) -> None:
    assert parse_seconds(text) == seconds


def test_the_shortest_text_is_printed() -> None:
    assert [format_bytes(x) for x in (0, 512_000_000, 2**30, 1234567, 1000, 1024, 3 * 2**60)] == [
        "0", "512MB", "1Gi", "1234567", "1kB", "1Ki", "3Ei",
    ]  # fmt: skip
    assert [format_cpu(x) for x in (500, 2000, 1)] == ["500m", "2", "1m"]
    assert [format_seconds(x) for x in (0, 90, 5400)] == ["0s", "1m30s", "1h30m"]


@given(st.integers(0, 2**63 - 1))
def test_bytes_read_back(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == size


@given(st.integers(0, 10**9))
def test_cpu_and_seconds_read_back(value: int) -> None:
    assert parse_cpu(format_cpu(value)) == value
    assert parse_seconds(format_seconds(value)) == value


@given(st.text())
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    for parse in (parse_cpu, parse_bytes, parse_gpu, parse_seconds):
        amount: Fraction | int = 0
        with contextlib.suppress(ValueError):
            amount = parse(text)
        assert amount >= 0


def test_resources_change_between_quantities_and_numbers() -> None:
    stored = {"cpuMillis": 500, "memoryBytes": 2**29, "diskBytes": 10**9, "gpu": 1}
    written = to_quantities(stored)
    assert written == {"cpu": "500m", "memory": "512Mi", "disk": "1GB", "gpu": 1}
    assert from_quantities(written) == stored
    assert from_quantities(stored) == stored
    with pytest.raises(ValueError, match="cpu and cpuMillis are both given"):
        from_quantities({"cpu": "1", "cpuMillis": 1})
    with pytest.raises(ValueError, match="memory has the unknown unit"):
        from_quantities({"memory": "1x"})
