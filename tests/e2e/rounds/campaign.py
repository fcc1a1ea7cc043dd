"""Rounds in a row on one fleet: work, faults, rest, verdict. A round that fails ends its fleet, whose
data are kept, and the next begins on a fresh one.
"""

import asyncio
import contextlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bacalhau.client import AsyncClient
from bacalhau_api.errors import BacalhauError, NotFoundError
from bacalhau_api.v1.execution import Acceptance, Execution
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from tests.e2e.cluster import ClusterError
from tests.e2e.rounds import checks, faults
from tests.e2e.rounds.checks import Findings
from tests.e2e.rounds.faults import CUTS_RUNS
from tests.e2e.rounds.fleet import Fleet, insist
from tests.e2e.rounds.lab import Lab
from tests.e2e.rounds.work import PROGRAMS, PROGRAMS_BY_NAME, Order, Program, orders, standing
from tests.support.dockerd import DockerdError

TROUBLE_SECONDS = 8.0
"""Faults and work begin within this time."""

REST_SECONDS_MAX = 100.0
"""Within which everything must have settled after the last fault."""

_CLEAR_TRIES = 300

HEADER = (
    f"{'round':>5}  {'seed':<12} {'jobs':>4} {'again':>5} {'lost':>4} {'doubled':>7} {'orphans':>7} {'stuck':>5} "
    f"{'seconds':>7}  faults"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one round went; `seconds` from the last fault to rest, `again` counts the attempts of its
    jobs beyond the first ones."""

    number: int
    seed: str
    faults: tuple[str, ...]
    jobs: int
    again: int
    findings: Findings
    seconds: float

    def row(self) -> str:
        """Its line of the table."""
        found = self.findings
        return (
            f"{self.number:>5}  {self.seed:<12} {self.jobs:>4} {self.again:>5} {len(found.lost):>4} "
            f"{len(found.doubled):>7} {len(found.orphans):>7} {len(found.stuck):>5} "
            f"{self.seconds:>7.1f}  {' '.join(self.faults)}"
        )


class Campaign:
    """Runs rounds and prints the table. `kept` is where the data of failed ones go."""

    def __init__(
        self, lab: Lab, root: Path, seed: str, *, agents: int = 3, program: str = "wasm"
    ) -> None:
        self._lab = lab
        self._root = root
        self._seed = seed
        self._agents = agents
        self._program: Program = PROGRAMS_BY_NAME[program]()
        self._fleets = 0
        self._fleet: Fleet | None = None
        self.kept: list[Path] = []

    async def run(self, rounds: int, first: int = 0) -> list[Verdict]:
        """So many rounds."""
        print(HEADER, flush=True)
        verdicts = []
        try:
            for number in range(first, first + rounds):
                verdict = await self._round(number)
                verdicts.append(verdict)
                print(verdict.row(), flush=True)
                if not verdict.findings.is_clean:
                    for line in verdict.findings.lines():
                        print(f"       {line}", flush=True)
                    await self._end_fleet(keep=True)
            await self._end_fleet(keep=False, verdicts=verdicts)
        finally:
            if self._fleet is not None:  # cut short
                self._fleet.destroy()
                shutil.rmtree(self._fleet.root, ignore_errors=True)
        return verdicts

    async def _round(self, number: int) -> Verdict:
        seed = f"{self._seed}/{number}"
        rng = Random(seed)
        fleet = await self._begin_fleet()
        plan = faults.draw(fleet, rng, TROUBLE_SECONDS)
        work = list(orders(f"r{number}", self._program, rng, TROUBLE_SECONDS))
        findings, again = Findings(), 0
        began = time.monotonic()
        async with fleet.client() as client:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._submit(client, work))
                    for fault in plan:
                        group.create_task(faults.strike(fleet, fault))
                await fleet.heal()
                began = time.monotonic()
                findings, again = await self._settle(fleet, client, work, plan)
                seconds = time.monotonic() - began
                if findings.is_clean:
                    await self._clear(client, work)
            except* (ClusterError, DockerdError, BacalhauError, TimeoutError) as group_error:
                findings.stuck += [f"{error!r}"[:2000] for error in _leaves(group_error)]
                seconds = time.monotonic() - began
            if not findings.is_clean:
                await self._write_down(fleet, client, findings, plan)
        names = tuple(str(fault) for fault in plan)
        return Verdict(number, seed, names, len(work), again, findings, seconds)

    async def _submit(self, client: AsyncClient, work: list[Order]) -> None:
        """Each at its time; again until it is acknowledged."""
        began = time.monotonic()

        async def submit(order: Order) -> None:
            await asyncio.sleep(max(0.0, began + order.at - time.monotonic()))
            await insist(lambda: client.apply(order.job))

        async with asyncio.TaskGroup() as group:
            for order in work:
                group.create_task(submit(order))

    async def _settle(
        self, fleet: Fleet, client: AsyncClient, work: list[Order], plan: list[faults.Planned]
    ) -> tuple[Findings, int]:
        deadline = time.monotonic() + REST_SECONDS_MAX
        is_calm = 0
        while True:
            sight = await checks.look(fleet, client)
            is_calm = 0 if checks.unsettled(sight, work) else is_calm + 1
            if is_calm >= 3 or time.monotonic() > deadline:
                names = {fault.kind.name for fault in plan}
                found = checks.judge(fleet, sight, work, restarts=bool(names & CUTS_RUNS))
                again = sum(e.spec.attempt > 0 for o in work for e in sight.of(o.job.name))
                return found, again
            await asyncio.sleep(0.3)

    async def _clear(self, client: AsyncClient, work: list[Order]) -> None:
        """Away with the jobs of a round; that, too, has to end."""
        for order in work:
            name = order.job.name

            async def delete(name: str = name) -> None:
                with contextlib.suppress(NotFoundError):
                    await client.delete(Job, name)

            await insist(delete)

        async def left() -> set[str]:
            return {job.name async for job in client.list(Job)}

        names = {order.job.name for order in work}
        for _ in range(_CLEAR_TRIES):
            if not names & await insist(left):
                return
            await asyncio.sleep(0.2)
        raise TimeoutError(f"jobs that were deleted are still there: {names & await insist(left)}")

    async def _begin_fleet(self) -> Fleet:
        if self._fleet is not None:
            return self._fleet
        self._fleets += 1
        root = self._root / f"fleet-{self._fleets}"
        fleet = self._fleet = Fleet(
            self._lab, root, self._agents, self._program, Random(self._seed)
        )
        await fleet.start(f"{PROGRAMS}/**")
        async with fleet.client() as client:
            for job in standing(self._program):
                await client.apply(job)
        return fleet

    async def _end_fleet(self, *, keep: bool, verdicts: list[Verdict] | None = None) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is None:
            return
        try:
            left = [] if keep else await fleet.close()
            if left and verdicts:
                verdicts[-1].findings.orphans += [f"left at the end: {line}" for line in left]
                print("\n".join(verdicts[-1].findings.lines()), flush=True)
                keep = True
            if keep:
                fleet.keep(fleet.root / "disks")
                self.kept.append(fleet.root)
        finally:
            fleet.destroy()
            if not keep:
                shutil.rmtree(fleet.root, ignore_errors=True)

    async def _write_down(
        self,
        fleet: Fleet,
        client: AsyncClient,
        findings: Findings,
        plan: list[faults.Planned],
    ) -> None:
        """What it takes to find the cause: all objects, and the history of those in question."""
        lines = [*findings.lines(), "", *(str(fault) for fault in plan), ""]
        (fleet.root / "findings.txt").write_text("\n".join(lines))
        for name, text in (await asyncio.to_thread(self._program.testimony)).items():
            (fleet.root / name).write_text(text)
        words = {word.strip(":,") for line in findings.lines() for word in line.split()}
        with contextlib.suppress(BacalhauError, TimeoutError, OSError):
            objects: list[Node | Job | Execution | Acceptance] = []
            async with asyncio.timeout(30):
                objects += [one async for one in client.list(Node)]
                objects += [one async for one in client.list(Job)]
                objects += [one async for one in client.list(Execution)]
                objects += [one async for one in client.list(Acceptance)]
                for one in objects:
                    if one.name in words or (isinstance(one, Execution) and one.spec.job in words):
                        past = await client.history(type(one), one.name, limit=1000)
                        text = json.dumps([item.wire() for item in past], indent=1)
                        (fleet.root / f"history-{one.kind}-{one.name}.json").write_text(text)
            text = json.dumps([one.wire() for one in objects], indent=1)
            (fleet.root / "objects.json").write_text(text)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
