"""How far transfers are and how fast they go, in words for users."""

from collections.abc import Sequence
from dataclasses import dataclass

from bacalhau_controllers.runner.ports import Progress

_MIB = 2**20


@dataclass(slots=True)
class Rate:
    """Tells how fast something grows, from one look to the next. Times are monotonic seconds."""

    at: float
    size_bytes: int = 0

    def of(self, found: Sequence[Progress], now: float) -> str:
        """Such as "312 of 1024 MiB, 98.5 MiB/s", and without a total where one is not known;
        empty if there is nothing to tell."""
        size = sum(progress.done_bytes for progress in found)
        rate = max(size - self.size_bytes, 0) / max(now - self.at, 0.001)
        self.at, self.size_bytes = now, size
        if not found:
            return ""
        totals = [progress.total_bytes for progress in found]
        of = "" if None in totals else f" of {sum(filter(None, totals)) / _MIB:.0f}"
        return f"{size / _MIB:.0f}{of} MiB, {rate / _MIB:.1f} MiB/s"
