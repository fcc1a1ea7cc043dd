"""Leases in the stream: a message that expires, and beside it the newest fencing token.

`l.<name>` is written with a time to live on each renewal. `f.<name>` is written at acquisition
only, in the same batch, right before it; the token is its sequence. Fenced commits expect
`f.<name>` to be still there.
"""

import math
from typing import Final

from bacalhau.store.batch import RefusedError, Sender, Tip
from bacalhau.store.codec import (
    EXPECT,
    OPERATION,
    TTL,
    Out,
    fence_subject,
    is_tombstone,
    lease_subject,
)
from bacalhau.store.stream import Stored, Stream
from bacalhau_api.errors import FencedError, OutcomeUnknownError, UnavailableError
from bacalhau_controllers.contract import Clock, Ids
from bacalhau_controllers.store import Fence, Lease, check_lease_ttl, lease_deadline

_HOLDER, _TOKEN, _ATTEMPT = "Holder", "Token", "Attempt"
_TRY_SECONDS: Final = 5.0
_RETRY_SECONDS = 0.1
_ONE_SECOND = "1s"
_ABANDONED_TIMES: Final = 1.5
"""A holder trusts its lease for less than the time of it, and renews it several times in that."""


class Leases:
    """See Store."""

    def __init__(self, stream: Stream, clock: Clock, ids: Ids, tip: Tip) -> None:
        self._stream = stream
        self._clock = clock
        self._ids = ids
        self._tip = tip
        self._sender = Sender(stream.transport, ids, tip)
        # Of leases that others hold: the message, and since when it is known.
        self._watched: dict[str, tuple[int, float]] = {}

    async def acquire(self, name: str, holder: str, ttl_seconds: float) -> Lease | None:
        """See Store.acquire_lease."""
        check_lease_ttl(ttl_seconds)
        attempt = self._ids.uid()
        sent = self._clock.monotonic()
        give_up = sent + _TRY_SECONDS
        while True:
            held = await self._stream.last(lease_subject(name))
            if held is not None and held.headers.get(_ATTEMPT) == attempt:
                # An earlier try went through, its answer was lost.
                return Lease(name, holder, held.sequence - 1, lease_deadline(sent, ttl_seconds))
            is_others = held is not None and _is_live(held) and _holder(held) != holder
            if held is not None and is_others and not self._is_abandoned(name, held):
                return None
            sent = self._clock.monotonic()
            try:
                token = await self._sender.batch(
                    [
                        Out(fence_subject(name), holder.encode(), {}),
                        Out(
                            lease_subject(name),
                            holder.encode(),
                            {
                                EXPECT: str(held.sequence if held else 0),
                                TTL: _whole_seconds(ttl_seconds),
                                _ATTEMPT: attempt,
                            },
                        ),
                    ]
                )
            except RefusedError:
                pass  # changed since it was read: look again
            except (OutcomeUnknownError, UnavailableError):
                await self._clock.sleep(_RETRY_SECONDS)
            else:
                self._tip.fences[name] = token
                return Lease(name, holder, token, lease_deadline(sent, ttl_seconds))
            if self._clock.monotonic() > give_up:
                raise UnavailableError(f"the store did not decide about the lease {name!r} in time")

    async def renew(self, lease: Lease, ttl_seconds: float) -> Lease:
        """See Store.renew_lease."""
        check_lease_ttl(ttl_seconds)
        give_up = self._clock.monotonic() + _TRY_SECONDS
        while True:
            held = await self._stream.last(lease_subject(lease.name))
            if held is None or not _is_live(held) or _token(held) != lease.token:
                raise FencedError(f"the lease {lease.name!r} is no longer held by {lease.holder!r}")
            sent = self._clock.monotonic()
            headers = {
                EXPECT: str(held.sequence),
                TTL: _whole_seconds(ttl_seconds),
                _TOKEN: str(lease.token),
            }
            message = Out(lease_subject(lease.name), lease.holder.encode(), headers)
            try:
                await self._sender.batch([message])
            except RefusedError:
                pass
            except (OutcomeUnknownError, UnavailableError):
                await self._clock.sleep(_RETRY_SECONDS)
            else:
                deadline = lease_deadline(sent, ttl_seconds)
                return Lease(lease.name, lease.holder, lease.token, deadline)
            if self._clock.monotonic() > give_up:
                raise UnavailableError(f"the store did not renew the lease {lease.name!r} in time")

    async def release(self, lease: Lease) -> None:
        """See Store.release_lease."""
        held = await self._stream.last(lease_subject(lease.name))
        if held is None or not _is_live(held) or _token(held) != lease.token:
            return
        headers = {EXPECT: str(held.sequence), TTL: _ONE_SECOND, OPERATION: "DEL"}
        try:
            await self._sender.batch([Out(lease_subject(lease.name), b"", headers)])
        except RefusedError:
            return  # renewed or taken meanwhile, by whoever owns it now

    def _is_abandoned(self, name: str, held: Stored) -> bool:
        """Whether a lease was not renewed for longer than it lasts. The server counts its time by
        the wall clock: where that was set back, it keeps a dead holder's lease for as long."""
        now = self._clock.monotonic()
        sequence, since = self._watched.get(name, (0, now))
        if sequence != held.sequence:
            self._watched[name] = held.sequence, now
            return False
        return now - since > _ABANDONED_TIMES * _seconds(held)

    async def is_current(self, fence: Fence) -> bool:
        """Whether a token is still the newest of its lease."""
        newest = await self._stream.last(fence_subject(fence.name))
        return newest is not None and newest.sequence == fence.token


def _is_live(message: Stored | None) -> bool:
    return message is not None and not is_tombstone(message.headers)


def _holder(message: Stored | None) -> str:
    return message.data.decode() if message else ""


def _token(message: Stored) -> int:
    # The message of the acquisition cannot name the token, which is the sequence before its own.
    return int(message.headers.get(_TOKEN, message.sequence - 1))


def _whole_seconds(ttl_seconds: float) -> str:
    return f"{math.ceil(ttl_seconds)}s"


def _seconds(message: Stored) -> float:
    """How long a lease lasts if it is not renewed."""
    text = message.headers.get(TTL, "").removesuffix("s")
    return float(text) if text.isdecimal() else math.inf
