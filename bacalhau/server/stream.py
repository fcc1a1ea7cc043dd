"""Answers without a known end: server-sent events, newline-delimited JSON, files.

A client that stops reading is dropped after a while; one that goes away is noticed at once.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

HEARTBEAT_SECONDS = 15.0
SEND_SECONDS_MAX = 60.0

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"


class Streamed(Response):
    """Sends the chunks of an asynchronous generator as they come.

    An error raised by the generator breaks the connection off, so that the client cannot take
    what it has for the whole; formats that can carry an error must do so themselves.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        *,
        status: int = 200,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(None, status, headers, media_type)
        if "content-length" in self.headers:
            del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, an error, or the client's departure."""
        pump = asyncio.create_task(self._pump(send))
        gone = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
        finally:
            pump.cancel()
            gone.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        try:
            await send(start)
            async for chunk in self._chunks:
                async with asyncio.timeout(SEND_SECONDS_MAX):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            aclose = getattr(self._chunks, "aclose", None)
            if aclose is not None:
                await aclose()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(event: str, data: bytes, cursor: str = "") -> bytes:
    """One server-sent event; `data` is JSON on one line."""
    head = f"id: {cursor}\n" if cursor else ""
    return f"{head}event: {event}\ndata: ".encode() + data + b"\n\n"


def sse_heartbeat(cursor: str = "") -> bytes:
    """A comment that keeps the line open. With a cursor, the place to resume from moves on."""
    return f": heartbeat\nid: {cursor}\n\n".encode() if cursor else b": heartbeat\n\n"


def json_line(data: Mapping[str, Any]) -> bytes:
    """One JSON object on one line, without its newline."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def disposition(file_name: str) -> str:
    """A Content-Disposition that always downloads, under a name that is only a name."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in file_name)
    return f'attachment; filename="{plain.lstrip(".")[:150] or "download"}"'
