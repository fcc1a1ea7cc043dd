"""Exit codes, and how errors are told.

Scripts rely on the codes; they are listed in docs/reference/cli.md.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau_api.errors import BacalhauError

OK: Final = 0
ERROR: Final = 1
USAGE: Final = 2
CHANGES: Final = 2
"""Of `plan`, `diff` and `simulate`: something would happen. Their wrong usage is an ERROR."""

JOB_FAILED: Final = 3
TIMEOUT: Final = 4
NOT_FOUND: Final = 5
UNAVAILABLE: Final = 6
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141


_REVIEWS: Final = frozenset({"plan", "diff", "simulate"})


def of_command(words: Sequence[str], code: int) -> int:
    """The exit code of a failed command line. Those that tell changes by their exit code have one
    code for all that went wrong."""
    command = next((w for w in words if not w.startswith("-")), "")
    is_wrong = code not in (OK, INTERRUPTED, BROKEN_PIPE)
    return ERROR if command in _REVIEWS and is_wrong else code


def usage(where: str, message: str, value: str = "", hint: str = "") -> "BacalhauError":
    """The error for words on the command line that make no sense."""
    from bacalhau_api.errors import InvalidError, Problem

    error = InvalidError([Problem(where, message, value, hint)])
    error.reason = "Usage"
    return error


def code_of(error: "BacalhauError") -> int:
    """The exit code that stands for an error."""
    from bacalhau_api.errors import NotFoundError, UnavailableError

    if isinstance(error, NotFoundError):
        return NOT_FOUND
    if error.reason == "Usage":
        return USAGE
    if error.reason == "WaitTimeout":
        return TIMEOUT
    if isinstance(error, UnavailableError):
        return UNAVAILABLE
    return ERROR


def tell(error: "BacalhauError") -> None:
    """One `error:` line on stderr, one more for each further problem, and the hint."""
    from bacalhau_api.errors import InvalidError

    problems = error.problems if isinstance(error, InvalidError) else ()
    lines = [str(problem) for problem in problems] or [error.message or error.reason]
    for line in lines:
        print(f"error: {clean(line)}", file=sys.stderr)
    if error.hint and not any(error.hint in line for line in lines):
        print(f"hint: {clean(error.hint)}", file=sys.stderr)


def warn(text: str) -> None:
    """One `warning:` line on stderr."""
    print(f"warning: {clean(text)}", file=sys.stderr)


def note(text: str) -> None:
    """One line on stderr for people, which scripts can ignore."""
    print(clean(text), file=sys.stderr)
