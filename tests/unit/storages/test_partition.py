"""Partition strategies: known hashes, and each object in exactly one partition."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bacalhau.storages.objects import Entry
from bacalhau.storages.partition import Layout, Partitioner, fnv1a
from bacalhau.storages.pins import Pinned, mine, read_part
from bacalhau_api.errors import TerminalError
from bacalhau_api.params import S3Partition


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0x811C9DC5), ("a", 0xE40C292C), ("b", 0xE70C2DE5), ("foobar", 0xBF9CF968)],
)
def test_fnv1a_is_the_published_one(text: str, value: int) -> None:
    assert fnv1a(text) == value


def strategy(**params: Any) -> S3Partition:
    return S3Partition(**params)


def parts(count: int, prefix: str, keys: list[str], **params: Any) -> list[int | None]:
    return Partitioner(strategy(**params), prefix, count).assign(keys)


def test_none_gives_everything_to_everybody() -> None:
    assert parts(3, "", ["a", "b"], type="none") == [None, None]
    assert parts(1, "", ["a"], type="object") == [None]


def test_object_hashes_the_whole_key() -> None:
    assert parts(7, "p/", ["p/a"], type="object") == [fnv1a("p/a") % 7]


@pytest.mark.parametrize(
    ("key", "hashed"),
    [("p/2024-x-1", "2024\x1fx"), ("p/zzz", None), ("other/2024-x", "2024\x1fx")],
)
def test_regex_hashes_its_groups(key: str, hashed: str | None) -> None:
    expected = 0 if hashed is None else fnv1a(hashed) % 5
    assert parts(5, "p/", [key], type="regex", pattern=r"(\d{4})-(\w)") == [expected]


def test_regex_without_groups_hashes_what_it_matches() -> None:
    assert parts(5, "p/", ["p/ab12"], type="regex", pattern=r"\d+") == [fnv1a("12") % 5]


def test_substring() -> None:
    given = {"type": "substring", "start_index": 1, "end_index": 3}
    assert parts(5, "p/", ["p/aéüd", "p/ab"], **given) == [fnv1a("éü") % 5, 0]


@pytest.mark.parametrize(
    ("layout", "text", "expected"),
    [
        ("2006-01-02", "2024-02-29/x", "2024-02-29"),
        ("2006-01-02", "2023-02-29/x", None),
        ("2006-01", "2024-13", None),
        ("2006/01/02/15", "2024/05/06/23.log", "2024/05/06/23"),
        ("2006/01/02/15", "2024/05/06/24.log", None),
        ("02 Jan 06", "07 Mar 24.csv", "07 Mar 24"),
        ("January 2", "March 07", "March 7"),
        ("2006-1-2", "2024-03-07x", "2024-3-7"),
        ("2006", "x2024", None),
        ("20060102", "20240229", "20240229"),
    ],
)
def test_dates(layout: str, text: str, expected: str | None) -> None:
    assert Layout(layout).read(text) == expected


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"type": "regex"}, "pattern is missing"),
        ({"type": "regex", "pattern": "("}, "not a regular expression"),
        ({"type": "substring", "start_index": 3, "end_index": 3}, "must be greater"),
        ({"type": "date"}, "dateFormat is missing"),
        ({"type": "date", "date_format": "yyyy"}, "names no part of a date"),
    ],
)
def test_wrong_params(params: dict[str, Any], words: str) -> None:
    with pytest.raises(TerminalError, match=words):
        Partitioner(strategy(**params), "", 2).check()


STRATEGIES = st.sampled_from(
    [
        strategy(type="object"),
        strategy(type="regex", pattern=r"(\w)(\d)?"),
        strategy(type="substring", start_index=0, end_index=2),
        strategy(type="date", date_format="2006-01"),
    ]
)


@given(
    STRATEGIES,
    st.integers(2, 9),
    st.sets(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), max_size=30
    ),
)
def test_each_object_is_in_exactly_one_partition(
    chosen: S3Partition, count: int, keys: set[str]
) -> None:
    entries = [Entry(key, len(key), "e") for key in sorted(keys)]
    shares = Partitioner(chosen, "", count).assign([entry.key for entry in entries])
    pinned = Pinned.of(entries, shares, count)
    lines = [line for part in pinned.parts() for line in read_part(part.data)]
    got = [entry for partition in range(count) for entry in mine(lines, partition)]
    assert sorted(got, key=lambda e: e.key) == entries
    assert sum(objects for objects, _ in pinned.sizes()) == len(entries)
    assert Pinned.of(list(reversed(entries)), list(reversed(shares)), count).digest == pinned.digest


def test_long_listings_are_cut_into_parts_by_partition() -> None:
    entries = [
        Entry(
            f"key/{hashlib.md5(str(n).encode()).hexdigest()}/{n}",
            n,
            f'"{hashlib.md5(b"%d" % -n).hexdigest()}"',
        )
        for n in range(16_000)
    ]
    shares = Partitioner(strategy(type="object"), "", 8).assign([e.key for e in entries])
    pinned = Pinned.of(entries, shares, 8)
    found = pinned.parts()
    assert len(found) > 2
    assert all(len(part.data) <= 256 * 1024 for part in found)
    for partition in range(8):
        lines = [x for p in found if p.first <= partition <= p.last for x in read_part(p.data)]
        expected = sorted(e.key for e, s in zip(entries, shares, strict=True) if s == partition)
        assert [e.key for e in mine(lines, partition)] == expected


def test_a_damaged_part_is_told() -> None:
    with pytest.raises(ValueError, match="damaged"):
        read_part(b"no zlib")
