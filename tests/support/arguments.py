"""Arguments of the long runs. One of nothing would pass, whatever is wrong."""

import argparse

from tests.simulation.world import Fault, Faults


def at_least_one(text: str) -> int:
    """A number of things to do."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {number})")
    return number


def fault_words(text: str) -> str:
    """What `Faults.parse` takes."""
    try:
        Faults.parse(text)
    except ValueError as error:
        known = ", ".join(sorted(Fault))
        raise argparse.ArgumentTypeError(f"{error}; use all, none or of these: {known}") from error
    return text
