"""Log records in the form a client asked for: lines of JSON, server-sent events, plain text."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Final

from fastapi import Depends, Query, Request

from bacalhau.replies import LogRecord
from bacalhau.server.logs import LogQuery, Record
from bacalhau.server.ports import LogStream
from bacalhau.server.problems import body_of
from bacalhau.server.reply import full_json
from bacalhau.server.routes_objects import READ_ERRORS
from bacalhau.server.stream import EVENT_STREAM, NDJSON, Streamed, json_line, sse, sse_heartbeat
from bacalhau_api.errors import BacalhauError

TAIL_LINES_MAX: Final = 100_000
TEXT: Final = "text/plain"


_RECORD: Final = LogRecord.model_json_schema(
    by_alias=True, ref_template="#/components/schemas/{model}"
)
_RECORD.pop("$defs")  # those of all answers are among the components

LOG_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "One JSON object a line (an empty line means: still here); with "
        "`Accept: text/event-stream` the same as events, with `text/plain` the output alone.",
        "content": {
            NDJSON: {"schema": _RECORD},
            EVENT_STREAM: {},
            TEXT: {"schema": {"type": "string"}},
        },
    },
    **READ_ERRORS,
}


def _log_query(
    follow: Annotated[bool, Query(description="Go on until it ends.")] = False,
    tail: Annotated[
        int | None,
        Query(ge=0, le=TAIL_LINES_MAX, description="Begin so many lines before the end."),
    ] = None,
    stream: Annotated[LogStream, Query()] = "all",
    offset: Annotated[
        int, Query(ge=0, le=2**62, description="Go on from an earlier record's offset.")
    ] = 0,
) -> LogQuery:
    return LogQuery(stream, offset, tail, follow)


LogParameters = Annotated[LogQuery, Depends(_log_query)]


async def log_response(request: Request, records: AsyncGenerator[Record | None, None]) -> Streamed:
    """Stream log records. What fails before the first one is an ordinary error; the first comes
    soon, if only to say that there is nothing yet, for until then nobody notices a client leave."""
    accept = request.headers.get("accept", "")
    try:
        first = [await anext(records)]
    except StopAsyncIteration:
        first = []
    if EVENT_STREAM in accept:
        return Streamed(_events(_joined(first, records)), media_type=EVENT_STREAM)
    if TEXT in accept:
        return Streamed(_text(_joined(first, records)), media_type=f"{TEXT}; charset=utf-8")
    return Streamed(_lines(_joined(first, records)), media_type=NDJSON)


async def _joined(
    first: list[Record | None], rest: AsyncGenerator[Record | None, None]
) -> AsyncGenerator[Record | None, None]:
    async with aclosing(rest) as records:
        for record in first:
            yield record
        try:
            async for record in records:
                yield record
        except BacalhauError as error:
            yield {"error": body_of(error)}
            return
        yield {"end": True}


def _encode(record: Record) -> bytes:
    error = record.get("error")
    return b'{"error":%s}' % full_json(error) if error else json_line(record)


async def _lines(records: AsyncGenerator[Record | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(records) as source:
        async for record in source:
            yield b"\n" if record is None else _encode(record) + b"\n"


async def _events(records: AsyncGenerator[Record | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(records) as source:
        async for record in source:
            if record is None:
                yield sse_heartbeat()
                continue
            kinds = ("error", "end", "notice")
            name = next((kind for kind in kinds if kind in record), "log")
            yield sse(name, _encode(record))


async def _text(records: AsyncGenerator[Record | None, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(records) as source:
        async for record in source:
            if record is not None and (text := record.get("text")):
                yield text.encode("utf-8", "replace")
