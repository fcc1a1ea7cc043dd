"""The disconnect policies, case by case: what becomes of each attempt of a slot, written out.

In each *scene* the machine `home` is cut off while 36 jobs run there, one for each job type, action
and rule; `other` could take what may be replaced. Real reconcilers and agents, in simulated time.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import pytest

from bacalhau_api.meta import Contact
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import (
    Constraint,
    DisconnectPolicy,
    JobSpec,
    JobType,
    Resources,
    SpecConfig,
    Task,
)
from tests.simulation.scripted import Script
from tests.simulation.world.machines import ENGINE

HOME, OTHER = "home", "other"
AFTER_SECONDS = 30
"""Of every policy. The node stops at 30 s under `stop`; replacements start at 30 s under `replace`,
and at about 92 s under `stop`: all of them before 120 s, when the cable is mended."""

MENDED_AT = 120.0

Action = Literal["hold", "replace", "stop"]
Rule = Literal["firstAccepted", "keepOriginal", "keepReplacement"]
ACTIONS: tuple[Action, ...] = ("hold", "replace", "stop")
RULES: tuple[Rule, ...] = ("firstAccepted", "keepOriginal", "keepReplacement")
Cell = tuple[str, Action, Rule]
CELLS: tuple[Cell, ...] = tuple(
    (kind.value, action, rule) for kind in JobType for action in ACTIONS for rule in RULES
)

# -- what happens: the cable of `home` is pulled at 0 s --------------------------------------------


def _end(script: Script, machine: str) -> None:
    """The work of batch and ops jobs ends well there; services and daemons go on."""
    for kind in ("batch", "ops"):
        script.end(machine, kind)


def _back_within_the_limit(script: Script) -> None:
    script.advance(20)
    script.mend(HOME)
    script.advance(40)
    _end(script, HOME)


def _back_with_a_result(script: Script) -> None:
    """It finished before any limit, and comes back while the replacement runs."""
    script.advance(15)
    _end(script, HOME)
    script.advance(MENDED_AT - 15)
    script.mend(HOME)
    script.advance(60)
    _end(script, OTHER)


def _back_with_a_result_too_late(script: Script) -> None:
    """As before, but the replacement has ended too."""
    script.advance(15)
    _end(script, HOME)
    script.advance(100)
    _end(script, OTHER)
    script.advance(5)
    script.mend(HOME)


def _back_and_first(script: Script) -> None:
    """It still runs when it comes back, and ends before its replacement does."""
    script.advance(MENDED_AT)
    script.mend(HOME)
    script.advance(30)
    _end(script, HOME)
    script.advance(30)
    _end(script, OTHER)


def _back_and_second(script: Script) -> None:
    """It still runs when it comes back, and its replacement ends before it does."""
    script.advance(MENDED_AT)
    script.mend(HOME)
    script.advance(30)
    _end(script, OTHER)
    script.advance(30)
    _end(script, HOME)


def _back_too_late(script: Script) -> None:
    """It still runs when it comes back, but its replacement has ended."""
    script.advance(MENDED_AT - 5)
    _end(script, OTHER)
    script.advance(5)
    script.mend(HOME)
    script.advance(60)
    _end(script, HOME)


def _never_back(script: Script) -> None:
    script.advance(MENDED_AT)
    _end(script, OTHER)
    script.advance(300)


def _back_with_an_empty_disk(script: Script) -> None:
    """A new machine in the place of the old one: nothing runs, nothing is known."""
    script.advance(MENDED_AT)
    home = script.machines[HOME]
    home.wipe()
    home.reboot()
    home.engine.runs.clear()
    home.start()
    script.mend(HOME)
    script.advance(60)
    _end(script, HOME)
    script.advance(30)
    _end(script, OTHER)


def _back_as_a_copy_from_before(script: Script) -> None:
    """Its disk is a copy from before it had the jobs; what ran still runs."""
    _restore(script, -2)


def _back_as_a_copy_of_the_begin(script: Script) -> None:
    """Its disk is a copy from when the jobs began; what ran still runs."""
    _restore(script, -1)


def _restore(script: Script, copy: int) -> None:
    script.advance(MENDED_AT)
    home = script.machines[HOME]
    home.copies = [home.copies[copy]]
    home.restore()
    home.start()
    script.mend(HOME)
    script.advance(60)
    _end(script, HOME)
    script.advance(30)
    _end(script, OTHER)


SCENES: dict[str, Callable[[Script], None]] = {
    "back within the limit": _back_within_the_limit,
    "back with a result": _back_with_a_result,
    "back with a result, too late": _back_with_a_result_too_late,
    "back and first": _back_and_first,
    "back and second": _back_and_second,
    "back too late": _back_too_late,
    "never back": _never_back,
    "back with an empty disk": _back_with_an_empty_disk,
    "back as a copy from before": _back_as_a_copy_from_before,
    "back as a copy of the begin": _back_as_a_copy_of_the_begin,
}

# -- what must come of it: type, action, then the words (see `_word`) by rule, firstAccepted, keepOriginal,
# keepReplacement; one word for each attempt, in order ---------------------------------------------

TABLE: dict[str, str] = {
    "back within the limit": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | accepted                      | accepted                      | accepted
        batch   stop    | accepted                      | accepted                      | accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | accepted                      | accepted                      | accepted
        service hold    | running                       | running                       | running
        service replace | running                       | running                       | running
        service stop    | running                       | running                       | running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | running                       | running                       | running
    """,
    "back with a result": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | accepted superseded/stopped   | accepted superseded/stopped   | superseded/succeeded accepted
        batch   stop    | accepted superseded/stopped   | accepted superseded/stopped   | superseded/succeeded accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | accepted                      | accepted                      | accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
    "back with a result, too late": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | superseded/succeeded accepted | superseded/succeeded accepted | superseded/succeeded accepted
        batch   stop    | superseded/succeeded accepted | superseded/succeeded accepted | superseded/succeeded accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | accepted                      | accepted                      | accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
    "back and first": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | accepted superseded/stopped   | accepted superseded/stopped   | superseded/stopped accepted
        batch   stop    | superseded/stopped accepted   | superseded/stopped accepted   | superseded/stopped accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | stopped accepted              | stopped accepted              | stopped accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
    "back and second": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | superseded/stopped accepted   | accepted superseded/stopped   | superseded/stopped accepted
        batch   stop    | superseded/stopped accepted   | superseded/stopped accepted   | superseded/stopped accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | stopped accepted              | stopped accepted              | stopped accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
    "back too late": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | superseded/stopped accepted   | superseded/stopped accepted   | superseded/stopped accepted
        batch   stop    | superseded/stopped accepted   | superseded/stopped accepted   | superseded/stopped accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | stopped accepted              | stopped accepted              | stopped accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
    "never back": """
        batch   hold    | unknown                       | unknown                       | unknown
        batch   replace | superseded/lost accepted      | superseded/lost accepted      | superseded/lost accepted
        batch   stop    | superseded/lost accepted      | superseded/lost accepted      | superseded/lost accepted
        ops     hold    | unknown                       | unknown                       | unknown
        ops     replace | unknown                       | unknown                       | unknown
        ops     stop    | lost                          | lost                          | lost
        service hold    | unknown                       | unknown                       | unknown
        service replace | lost running                  | lost running                  | superseded/lost running
        service stop    | superseded/lost running       | superseded/lost running       | superseded/lost running
        daemon  hold    | unknown                       | unknown                       | unknown
        daemon  replace | unknown                       | unknown                       | unknown
        daemon  stop    | lost                          | lost                          | lost
    """,
    "back with an empty disk": """
        batch   hold    | failed accepted               | failed accepted               | failed accepted
        batch   replace | failed accepted               | failed accepted               | failed accepted
        batch   stop    | failed accepted               | failed accepted               | failed accepted
        ops     hold    | failed accepted               | failed accepted               | failed accepted
        ops     replace | failed accepted               | failed accepted               | failed accepted
        ops     stop    | failed accepted               | failed accepted               | failed accepted
        service hold    | failed running                | failed running                | failed running
        service replace | failed running                | failed running                | failed running
        service stop    | failed running                | failed running                | failed running
        daemon  hold    | failed running                | failed running                | failed running
        daemon  replace | failed running                | failed running                | failed running
        daemon  stop    | failed running                | failed running                | failed running
    """,
    "back as a copy from before": """
        batch   hold    | failed accepted               | failed accepted               | failed accepted
        batch   replace | failed accepted               | failed accepted               | failed accepted
        batch   stop    | failed accepted               | failed accepted               | failed accepted
        ops     hold    | failed accepted               | failed accepted               | failed accepted
        ops     replace | failed accepted               | failed accepted               | failed accepted
        ops     stop    | failed accepted               | failed accepted               | failed accepted
        service hold    | failed running                | failed running                | failed running
        service replace | failed running                | failed running                | failed running
        service stop    | failed running                | failed running                | failed running
        daemon  hold    | failed running                | failed running                | failed running
        daemon  replace | failed running                | failed running                | failed running
        daemon  stop    | failed running                | failed running                | failed running
    """,
    "back as a copy of the begin": """
        batch   hold    | accepted                      | accepted                      | accepted
        batch   replace | accepted superseded/stopped   | accepted superseded/stopped   | superseded/stopped accepted
        batch   stop    | superseded/stopped accepted   | superseded/stopped accepted   | superseded/stopped accepted
        ops     hold    | accepted                      | accepted                      | accepted
        ops     replace | accepted                      | accepted                      | accepted
        ops     stop    | stopped accepted              | stopped accepted              | stopped accepted
        service hold    | running                       | running                       | running
        service replace | superseded/stopped running    | running superseded/stopped    | superseded/stopped running
        service stop    | superseded/stopped running    | superseded/stopped running    | superseded/stopped running
        daemon  hold    | running                       | running                       | running
        daemon  replace | running                       | running                       | running
        daemon  stop    | stopped running               | stopped running               | stopped running
    """,
}

# -- how it came out -------------------------------------------------------------------------------


def _name(cell: Cell) -> str:
    return "-".join(cell).lower()


def _spec(cell: Cell) -> JobSpec:
    kind, action, rule = cell
    here = Constraint(key="zone", operator="=", values=(HOME,))
    task = Task(
        engine=SpecConfig(type=ENGINE, params={"seconds": "for ever"}),
        resources=Resources(cpu_millis=10, memory_bytes=1 << 20),
    )
    return JobSpec(
        type=JobType(kind),
        tasks=(task,),
        constraints=(here,) if JobType(kind).is_per_node else (),
        disconnect=DisconnectPolicy(action=action, after_seconds=AFTER_SECONDS, reconcile=rule),
    )


def _word(execution: Execution, accepted: list[str]) -> str:
    """What became of one attempt: `accepted`, or how it ended or is, after `superseded/` if another
    attempt of its slot was preferred to it although it had not failed."""
    if execution.name in accepted:
        return "accepted"
    status = execution.status
    is_told = execution.phase.is_final or status.contact is Contact.REACHABLE
    word = str(execution.phase if is_told else status.contact).lower()
    is_spared = execution.spec.superseded and word != "failed"
    return f"superseded/{word}" if is_spared else word


@cache
def outcomes(scene: str) -> dict[Cell, str]:
    """What a scene led to: for each cell the words of its attempts, in order."""
    with Script({HOME: {"zone": HOME}, OTHER: {"zone": OTHER}}) as script:
        home = script.machines[HOME]
        script.cordon(OTHER)
        home.remember()
        for cell in CELLS:
            script.apply(_name(cell), _spec(cell))
        script.until(lambda: len(home.ledger.stored.executions) == len(CELLS))
        home.remember()
        script.until(lambda: len(script.running("")) == len(CELLS))
        script.cordon(OTHER, unschedulable=False)
        script.advance(10)
        script.cut(HOME)
        SCENES[scene](script)
        script.advance(90)
        found = {}
        for cell in CELLS:
            name = _name(cell)
            accepted = script.accepted(name)
            assert len(accepted) <= 1
            found[cell] = " ".join(_word(e, accepted) for e in script.attempts(name))
        return found


def _table(scene: str) -> dict[Cell, str]:
    found = {}
    for line in TABLE[scene].strip().splitlines():
        head, *cells = (part.strip() for part in line.split("|"))
        kind, action = head.split()
        for rule, cell in zip(RULES, cells, strict=True):
            assert action in ACTIONS
            found[kind, action, rule] = cell
    return found


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(SCENES)
    for scene in TABLE:
        assert set(_table(scene)) == set(CELLS)


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("kind", list(JobType))
@pytest.mark.parametrize("scene", list(SCENES))
def test_each_case(scene: str, kind: JobType, action: Action) -> None:
    found, wanted = outcomes(scene), _table(scene)
    for rule in RULES:
        cell = (kind.value, action, rule)
        assert found[cell] == wanted[cell], rule
