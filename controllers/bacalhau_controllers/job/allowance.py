"""What a namespace has left of its quota: pure, asked before each placement."""

from dataclasses import dataclass
from typing import Final

from bacalhau_api.v1.namespace import QUOTA_WAIT, Namespace, Quota
from bacalhau_controllers.placement import Amounts
from bacalhau_controllers.placement.resources import DIMENSIONS, text_of

QUOTA: Final = QUOTA_WAIT

_WORDS: Final = ("CPU", "memory", "disk", "GPU", "executions")


@dataclass(frozen=True, slots=True)
class Allowance:
    """The quota of a namespace. `stored` is how many bytes of outputs are kept in it."""

    namespace: str
    quota: Quota
    stored: int = 0

    @staticmethod
    def of(namespace: Namespace | None, stored: int) -> "Allowance | None":
        """None where nothing is limited."""
        if namespace is None or namespace.spec.quota == Quota():
            return None
        return Allowance(namespace.name, namespace.spec.quota, stored)

    def refusal(self, used: Amounts, need: Amounts) -> str:
        """Why one more execution has to wait; empty if it may start. `used` is what the namespace
        takes now."""
        limits = self._limits()
        for i, limit in enumerate(limits):
            if limit is not None and need[i] and used[i] + need[i] > limit:
                return self._words(i, used[i], need[i], limit)
        most = self.quota.stored_results
        if most and self.stored >= most:
            have, of = text_of("Disk", self.stored), text_of("Disk", most)
            return f"namespace {self.namespace} keeps {have} of results, its quota is {of}"
        return ""

    def _limits(self) -> tuple[int | None, ...]:
        asked = self.quota.resources
        return (
            asked.cpu_millis or None,
            asked.memory_bytes or None,
            asked.disk_bytes or None,
            asked.gpu or None,
            self.quota.executions,
        )

    def _words(self, dimension: int, used: int, need: int, limit: int) -> str:
        name, word = DIMENSIONS[dimension], _WORDS[dimension]
        text = f"namespace {self.namespace} uses {text_of(name, used)} of its quota of "
        text += f"{text_of(name, limit)} {word}"
        return text if dimension == len(_WORDS) - 1 else f"{text}, {text_of(name, need)} asked for"
