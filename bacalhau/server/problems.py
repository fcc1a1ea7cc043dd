"""One shape for every error: what the API answers when it does not answer what was asked.

Leaves to the routes what went wrong; here only becomes words, a status, and JSON.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bacalhau.replies import ErrorModel, ProblemModel
from bacalhau_api.errors import (
    BacalhauError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    Problem,
    TerminalError,
    TransientError,
)

if TYPE_CHECKING:  # a node's agent uses what is here without FastAPI
    from fastapi import FastAPI

VALUE_LENGTH_MAX = 120
PROBLEMS_MAX = 50
RETRY_AFTER_SECONDS = 2


class ApiError(BacalhauError):
    """An error of the HTTP layer itself, which has no class in the tree: it names its status."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        hint: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, hint=hint, reason=reason)
        self.status = status
        self.headers = dict(headers or {})


_STATUS: Final[Sequence[tuple[type[BacalhauError], int]]] = (
    (InvalidError, 400),
    (NotFoundError, 404),
    (ForbiddenError, 403),
    (ConflictError, 409),
    (TransientError, 503),
    # Fenced included: this process has lost its lease, another one can serve the request.
    (TerminalError, 503),
)
_STATUS_BY_REASON: Final = {"AlreadyExists": 409, "Expired": 410}


def status_of(error: BacalhauError) -> int:
    """The HTTP status that an error of the tree is answered with."""
    if isinstance(error, ApiError):
        return error.status
    if error.reason in _STATUS_BY_REASON:
        return _STATUS_BY_REASON[error.reason]
    if type(error) is TerminalError:
        return 400
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def body_of(error: BacalhauError) -> ErrorModel:
    """The body that an error of the tree is answered with."""
    problems = error.problems if isinstance(error, InvalidError) else ()
    first = problems[0] if problems else Problem("", "")
    message = str(problems[0]) if len(problems) == 1 else error.message
    if len(problems) > 1:
        message = f"{len(problems)} problems; the first: {first}"
    return ErrorModel(
        reason=error.reason,
        message=printable(message),
        field=printable(first.field),
        value=printable(first.value),
        hint=printable(error.hint or first.hint),
        problems=tuple(
            ProblemModel(
                field=printable(p.field),
                message=printable(p.message),
                value=printable(p.value),
                hint=printable(p.hint),
            )
            for p in problems[:PROBLEMS_MAX]
        ),
    )


def printable(text: str) -> str:
    """Text that survives UTF-8, whatever an input put into it (lone surrogates do not)."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: BacalhauError) -> Response:
    """The whole answer."""
    status = status_of(error)
    headers = dict(error.headers) if isinstance(error, ApiError) else {}
    if status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    # Not the compact form: clients may rely on every field being there.
    body = json.dumps(body_of(error).model_dump(mode="json", by_alias=True), ensure_ascii=False)
    return Response(body.encode(), status, headers, media_type="application/json")


def render(value: object) -> str:
    """A short, safe rendering of something a user gave."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=repr)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= VALUE_LENGTH_MAX else text[: VALUE_LENGTH_MAX - 1] + "…"


def from_validation(
    errors: Sequence[Any], *, skip: Sequence[str] = (), hint: str = ""
) -> InvalidError:
    """Pydantic's (or FastAPI's) findings as ours. `skip` names leading path parts to leave out."""
    problems = []
    for found in errors[:PROBLEMS_MAX]:
        where = [part for part in found["loc"] if part not in skip]
        message = found["msg"].removeprefix("Value error, ")
        value = "" if found["type"] in ("missing", "extra_forbidden") else render(found["input"])
        problems.append(Problem(_path(where), message, value))
    return InvalidError(problems or [Problem("", "the input is not valid")], hint=hint)


def _path(parts: Sequence[object]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def install(app: "FastAPI") -> None:
    """Make every failure of `app` come out in the one shape."""
    from fastapi.exceptions import RequestValidationError

    @app.exception_handler(BacalhauError)
    async def on_error(request: Request, error: BacalhauError) -> Response:
        return error_response(error)

    @app.exception_handler(ValidationError)
    async def on_invalid(request: Request, error: ValidationError) -> Response:
        return error_response(from_validation(error.errors(include_url=False)))

    @app.exception_handler(RequestValidationError)
    async def on_bad_request(request: Request, error: RequestValidationError) -> Response:
        return error_response(from_validation(error.errors(), skip=("query", "path", "header")))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        return error_response(_from_http(request, error))

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Exception) -> Response:
        # Starlette logs the traceback by itself after this answer.
        message = "the server failed in a way it was not written for"
        hint = "this is a bug; the server's log has the details"
        return error_response(ApiError(500, "InternalError", message, hint=hint))


def _from_http(request: Request, error: HTTPException) -> ApiError:
    path = render(request.url.path)
    headers = error.headers or {}
    if error.status_code == 404:
        hint = "paths look like /apis/bacalhau.org/v1/namespaces/default/jobs; see /openapi.json"
        return ApiError(404, "NotFound", f"there is nothing at {path}", hint=hint)
    if error.status_code == 405:
        message = f"{request.method} is not possible on {path}"
        allow = ", ".join(_methods_of(request)) or headers.get("Allow", "")
        return ApiError(
            405, "MethodNotAllowed", message, hint=f"possible: {allow}", headers={"Allow": allow}
        )
    reason = "BadRequest" if error.status_code < 500 else "InternalError"
    return ApiError(error.status_code, reason, str(error.detail), headers=headers)


def _methods_of(request: Request) -> list[str]:
    """What is possible on a path. The router itself names the methods of the first route only."""
    return sorted(
        method.upper()
        for template, methods in request.app.openapi()["paths"].items()
        if _path_pattern(template).fullmatch(request.url.path)
        for method in methods
    )


@lru_cache(maxsize=256)
def _path_pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{[a-z]+\\}", "[^/]+", re.escape(template)))
