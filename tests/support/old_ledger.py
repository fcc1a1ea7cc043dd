"""Makes a ledger with something of everything, to be kept as a file of the present schema.

    python -m tests.support.old_ledger tests/unit/node/data/ledger-schema-N.db

Such a file is made once, by the last version that writes schema N, and never changed.
"""

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock
from bacalhau_api.v1.execution import Phase, PublicationPhase, PublicationReport, Report
from bacalhau_api.wire import Fact
from bacalhau_controllers.runner.ledger import (
    Entry,
    PublicationState,
    PutContact,
    PutExecution,
    PutFact,
    PutPublication,
    PutPublicationState,
    PutState,
)
from bacalhau_controllers.runner.state import Instant, Stage, new_state
from tests.support.runner import execution, publication

INCARNATION = "the-first-ledger"
MADE = datetime(2026, 1, 1, tzinfo=UTC)
NOW = Instant(wall=MADE, mono=12.5, boot="b1")


class _Ids:
    def uid(self) -> str:
        """The same each time."""
        return INCARNATION


class _Clock(SystemClock):
    def now(self) -> datetime:
        """The same each time."""
        return MADE


def content() -> list[Entry]:
    """An execution in each stage; facts of three, publications of two."""
    entries: list[Entry] = [PutContact(NOW)]
    for number, stage in enumerate(stage for stage in Stage if stage is not Stage.GONE):
        one = execution(f"old-{number}", inputs=("/data",), results=("out",), local_deadline=60)
        uid = one.metadata.uid
        state = new_state(INCARNATION, NOW).but(stage=stage, run=number, due=NOW.plus(3))
        entries += [PutExecution(one), PutState(uid, state)]
        if number < 3:
            report = Report(step=number + 1, incarnation=INCARNATION, phase=Phase.RUNNING)
            fact = Fact(seq=number + 1, namespace="default", name=one.name, uid=uid)
            entries.append(PutFact(fact.but(execution=report)))
        if number < 2:
            sent = publication(one)
            told = PublicationReport(
                step=1, incarnation=INCARNATION, phase=PublicationPhase.PUBLISHING
            )
            progress = PublicationState(since=NOW, report=told)
            entries += [PutPublication(sent), PutPublicationState(sent.metadata.uid, progress)]
    return entries


async def make(path: Path) -> None:
    """Write it."""
    ledger = SqliteLedger(path, _Clock(), _Ids())
    await ledger.open()
    await ledger.commit(content())
    await ledger.close()


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1])))
