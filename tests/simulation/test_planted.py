"""The world finds bugs: a few quick ones here, all of them in `python -m tests.simulation.planted`."""

import pytest

from tests.simulation.planted import BUGS, hunt

QUICK = {
    "acknowledge-before-storing": "I4",
    "write-without-fence": "I8",
    "keep-finished-jobs-for-no-time": "I1",
    "forget-reservations": "I10",
    "publish-without-accepting": "I2",
    "wait-for-nothing": "I6",
    "unknown-is-gone": "I12",
    "keep-what-nobody-wants": "I5",
}


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_found(name: str) -> None:
    (bug,) = [one for one in BUGS if one.name == name]
    assert hunt(bug, 20).invariant == QUICK[name]


def test_the_bugs_are_many_and_have_names_of_their_own() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 30
