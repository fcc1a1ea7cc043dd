"""The tree of errors. The class says what to do next; the message names the object and the remedy.

BacalhauError
├── TransientError          try again later, unchanged
│   ├── ConflictError       someone else wrote first: read again, decide again
│   ├── UnavailableError    a peer (store, node, engine) did not answer or refused for now
│   └── OutcomeUnknownError a write was sent and its answer lost: it may have happened
└── TerminalError           do not try again until something is changed
    ├── InvalidError        input is wrong: carries the problems, field by field
    ├── NotFoundError
    ├── ForbiddenError
    └── FencedError         this process has lost the lease under which it wrote
"""

from collections.abc import Sequence
from dataclasses import dataclass


class BacalhauError(Exception):
    """Root of all errors this project raises on purpose. `reason` is one CamelCase word."""

    reason = "Error"

    def __init__(self, message: str, *, hint: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if reason:
            self.reason = reason


class TransientError(BacalhauError):
    """Nothing is wrong with the request; the same call may succeed later."""

    reason = "Transient"


class ConflictError(TransientError):
    """A compare-and-set lost: the object was changed, created or deleted meanwhile."""

    reason = "Conflict"


class UnavailableError(TransientError):
    """A peer could not be reached, or answered that it cannot serve now."""

    reason = "Unavailable"


class OutcomeUnknownError(TransientError):
    """A write was sent but its answer was lost. Read the object before writing again."""

    reason = "OutcomeUnknown"


class TerminalError(BacalhauError):
    """Trying again unchanged cannot help."""

    reason = "Terminal"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input.

    `field` is a path as the user wrote it (`spec.tasks[0].engine.type`), `value` a short rendering
    of what was given, `hint` the remedy (such as the nearest known field), `where` the source and
    line (`job.yaml:12`) if the input came from a file.
    """

    field: str
    message: str
    value: str = ""
    hint: str = ""
    where: str = ""

    def __str__(self) -> str:
        text = f"{self.field}: {self.message}" if self.field else self.message
        if self.where:
            text = f"{self.where}: {text}"
        if self.value:
            text += f" (got {self.value})"
        return f"{text}; {self.hint}" if self.hint else text


class InvalidError(TerminalError):
    """An input was refused. `problems` has one entry for each thing that is wrong."""

    reason = "Invalid"

    def __init__(self, problems: Sequence[Problem], *, hint: str = "") -> None:
        super().__init__("\n".join(str(p) for p in problems), hint=hint)
        self.problems = tuple(problems)


class NotFoundError(TerminalError):
    """The named object does not exist."""

    reason = "NotFound"


class ForbiddenError(TerminalError):
    """The caller is known, and may not do this."""

    reason = "Forbidden"


class FencedError(TerminalError):
    """The lease under which this process wrote now belongs to another. Stop writing."""

    reason = "Fenced"
