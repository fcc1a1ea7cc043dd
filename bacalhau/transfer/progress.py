"""How far a transfer is, written by the one that moves the bytes and read by anybody."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class CancelledTransferError(Exception):
    """Nobody waits for this transfer any more."""


@dataclass(slots=True)
class Transfer:
    """One transfer. `total` is None while unknown. Fields are written by one thread."""

    what: str = ""
    done: int = 0
    total: int | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _closers: list[Callable[[], None]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raises CancelledTransferError once cancelled."""
        if self._stop.is_set():
            raise CancelledTransferError

    @property
    def is_cancelled(self) -> bool:
        """True once nobody waits for it."""
        return self._stop.is_set()

    def cancel(self) -> None:
        """Give it up, waking a thread that waits for the network."""
        self._stop.set()
        with self._lock:
            closers = list(self._closers)
        for close in closers:
            close()

    def counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces; each counts as done once the next is asked for."""
        for piece in pieces:
            yield piece
            self.done += len(piece)

    def on_cancel(self, close: Callable[[], None]) -> Callable[[], None]:
        """Have `close` called on cancelling; returns what takes that back."""
        with self._lock:
            self._closers.append(close)
        if self._stop.is_set():
            close()

        def forget() -> None:
            with self._lock:
                if close in self._closers:
                    self._closers.remove(close)

        return forget
