"""Answers and failures of HTTP, as the errors of this project."""

from pydantic import ValidationError

from bacalhau.replies import ErrorModel
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    OutcomeUnknownError,
    Problem,
    TerminalError,
    TransientError,
    UnavailableError,
)


class WaitTimeoutError(TransientError):
    """What was waited for did not happen in time; it may still."""

    reason = "WaitTimeout"


class ConnectError(UnavailableError):
    """Nobody answered at the server's address."""

    reason = "ConnectionFailed"


_BY_STATUS: dict[int, type[BacalhauError]] = {
    401: ForbiddenError,
    403: ForbiddenError,
    404: NotFoundError,
    408: UnavailableError,
    409: ConflictError,
    429: UnavailableError,
    502: UnavailableError,
    503: UnavailableError,
    504: UnavailableError,
}


def error_from(status: int, body: bytes) -> BacalhauError:
    """The error that an answer with a status of 400 or more stands for."""
    try:
        told = ErrorModel.model_validate_json(body)
    except ValidationError:
        text = body[:200].decode("utf-8", "replace").strip()
        told = ErrorModel(
            reason="UnexpectedAnswer",
            message=f"the server answered {status}{f': {text}' if text else ''}",
            hint="is this really a Bacalhau server? check the address",
        )
    return error_of(told, status)


def error_of(told: ErrorModel, status: int = 0) -> BacalhauError:
    """The error that an error body stands for."""
    if told.problems:
        problems = [Problem(p.field, p.message, p.value, p.hint) for p in told.problems]
        return InvalidError(problems, hint=told.hint)
    if told.reason == OutcomeUnknownError.reason:
        return OutcomeUnknownError(told.message, hint=told.hint)
    kind = _BY_STATUS.get(status)
    if kind is None:
        kind = TerminalError if 400 <= status < 500 else BacalhauError
    return kind(told.message, hint=told.hint, reason=told.reason)


def connection_error(server: str, error: Exception) -> UnavailableError:
    """The error for a server that could not be reached, or broke off."""
    text = str(error) or type(error).__name__
    if server.startswith("unix:"):
        refused = "denied" in text.lower() or isinstance(error, PermissionError)
        hint = (
            "ask as the user that the agent runs as"
            if refused
            else "the agent does not run, or is about to start: look at its log"
        )
        return ConnectError(
            f"no agent answers at {server.removeprefix('unix:')}: {text}", hint=hint
        )
    is_local = any(name in server for name in ("127.0.0.1", "localhost", "[::1]"))
    hint = (
        "start one with `bacalhau serve`, or name another with --server or BACALHAU_SERVER"
        if is_local
        else "check the address (--server or BACALHAU_SERVER) and that the server runs"
    )
    return ConnectError(f"no server answers at {server}: {text}", hint=hint)


def unreadable(what: str, error: Exception) -> BacalhauError:
    """The error for an answer that is not what this client understands."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return BacalhauError(
        f"the server's {what} could not be read: {text}",
        hint="client and server may be of different versions: see `bacalhau version`",
        reason="UnexpectedAnswer",
    )
