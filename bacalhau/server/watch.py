"""A watch as server-sent events."""

import asyncio
from collections.abc import AsyncIterator

from bacalhau.server.hub import Event, Subscription, WatchHub
from bacalhau.server.problems import ApiError, body_of
from bacalhau.server.query import Selection
from bacalhau.server.reply import full_json
from bacalhau.server.stream import EVENT_STREAM, HEARTBEAT_SECONDS, Streamed, sse, sse_heartbeat
from bacalhau_controllers.store import Cursor

WATCH_SECONDS_MAX = 24 * 3600.0


def watch_response(
    hub: WatchHub,
    selection: Selection,
    since: Cursor | None,
    timeout_seconds: float | None,
    *,
    heartbeat_seconds: float = HEARTBEAT_SECONDS,
) -> Streamed:
    """Stream what `selection` means, from the present or after `since`."""
    seconds = min(timeout_seconds or WATCH_SECONDS_MAX, WATCH_SECONDS_MAX)
    hub.check_room()
    return Streamed(
        _events(hub, selection, since, seconds, heartbeat_seconds),
        media_type=EVENT_STREAM,
        headers={"X-Accel-Buffering": "no"},
    )


async def _events(
    hub: WatchHub,
    selection: Selection,
    since: Cursor | None,
    seconds: float,
    heartbeat_seconds: float,
) -> AsyncIterator[bytes]:
    # Not earlier: the end of a generator that never began would not be noticed.
    subscription = hub.subscribe(selection, since)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    cursor = ""
    try:
        for event in subscription.initial:
            cursor = event.cursor or cursor
            yield _frame(event)
        while (left := deadline - loop.time()) > 0:
            taken = await subscription.take(min(left, heartbeat_seconds))
            if taken is not None:
                cursor = taken.cursor or cursor
                yield _frame(taken)
            elif subscription.is_cut or subscription.is_closed:
                yield _farewell(subscription, cursor)
                return
            elif left > heartbeat_seconds:
                cursor = hub.cursor or cursor
                yield sse_heartbeat(cursor)
    finally:
        hub.unsubscribe(subscription)


def _frame(event: Event) -> bytes:
    data = b'{"type":"%s","object":%s}' % (event.type.encode(), event.body)
    return sse(event.type, data, event.cursor)


def _farewell(subscription: Subscription, cursor: str) -> bytes:
    hint = f"watch again with resourceVersion={cursor}" if cursor else "watch again"
    if subscription.is_cut:
        error = ApiError(
            429, "SlowClient", "events came faster than this client read them", hint=hint
        )
    else:
        message = "the server is about to end, or reads its store anew"
        error = ApiError(503, "ServerClosing", message, hint=hint)
    return _frame(Event("ERROR", full_json(body_of(error))))
