"""Whose log is read when: the attempts of a slot one after the other."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from bacalhau_api.v1.execution import Execution, Slot

E = TypeVar("E", bound=Execution)


def in_turn(executions: Iterable[E], is_read: Callable[[E], bool]) -> Iterator[E]:
    """Those whose logs may be read now, in order of slots and attempts.

    Logs that are read side by side arrive in any order, and a slot's attempts must not: people
    take what comes last for what the job does now. So an attempt waits for the earlier ones, as
    soon as these have ended, until `is_read` says that nothing is to be waited for any more. One
    that still runs elsewhere (it was replaced while cut off) holds up nobody.
    """
    unread: set[Slot] = set()
    for execution in sorted(executions, key=_place):
        if execution.spec.slot in unread:
            continue
        yield execution
        if execution.is_final and not is_read(execution):
            unread.add(execution.spec.slot)


def _place(execution: Execution) -> tuple[int, int, str, int]:
    slot = execution.spec.slot
    return slot.generation, slot.partition, slot.node, execution.spec.attempt
