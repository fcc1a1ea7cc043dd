"""Random changes, planned on a real server and then made there, with real nodes: what a plan lists
is what happens. `tests/unit/controllers/forecast` has many more, in virtual time."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import pytest

from bacalhau.client.sync import Client
from bacalhau.replies import DocumentText, SetRequest
from bacalhau_api.plans import ChangePlan, InventoryEntry
from bacalhau_api.v1.execution import Desired, Execution, Phase
from bacalhau_api.v1.job import Job
from tests.e2e.cluster import Cluster

SPACE = "plans"
OWNER = "source/plans"
NAMES = ("a", "b", "c", "d")
TYPES = ("batch", "batch", "service", "daemon", "ops")
ROUNDS = 8
SETTLE_SECONDS = 90.0
LATE_SECONDS = 30.0
HEALTHY_SECONDS = 5.0
"""For so long a new execution has to run before a rollout goes on."""

MOVING = ("Rollout", "Stop", "Retry", "Contact")
"""What a job waits for while something of it is under way."""

Facts = Counter[tuple[str, str]]
"""Executions by job and node."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An orchestrator and two nodes of which each has room for a few."""
    made = Cluster(tmp_path_factory.mktemp("fleet"))
    made.start(["edge-1", "edge-2"], args=["--on-exit", "stop", "--cpu", "1", "--memory", "1GB"])
    yield made
    assert made.close() == []


@dataclass(frozen=True)
class Wish:
    """A job as its file declares it. It runs until it is stopped."""

    type: str
    count: int
    cpu: int
    mode: str
    label: str

    @staticmethod
    def random(rng: Random, kind: str) -> "Wish":
        """Of this type, and perhaps more than fits."""
        count = 1 if kind in ("daemon", "ops") else rng.randint(1, 3)
        cpu = rng.choice((100, 200, 400))
        return Wish(kind, count, cpu, rng.choice("xyz"), rng.choice("uv"))

    def text(self, name: str) -> str:
        """The manifest."""
        count = f"  count: {self.count}\n" if self.type in ("batch", "service") else ""
        return (
            f"apiVersion: bacalhau.org/v1\nkind: Job\n"
            f"metadata: {{name: {name}, namespace: {SPACE}, labels: {{team: {self.label}}}}}\n"
            f"spec:\n  type: {self.type}\n{count}  tasks:\n"
            f"    - name: main\n      engine: {{type: noop, params: {{durationSeconds: 86400}}}}\n"
            f"      env: {{MODE: {self.mode}}}\n"
            f"      resources: {{cpu: {self.cpu}m, memory: 1Mi}}\n"
        )


def quota(executions: int) -> str:
    """The namespace of the jobs here."""
    return (
        f"apiVersion: bacalhau.org/v1\nkind: Namespace\nmetadata: {{name: {SPACE}}}\n"
        f"spec: {{quota: {{executions: {executions}}}}}\n"
    )


class Fleet:
    """What is declared, and a server to hold it against."""

    def __init__(self, client: Client, rng: Random) -> None:
        self.client = client
        self.rng = rng
        self.wishes: dict[str, Wish] = {}

    def change(self) -> SetRequest:
        """Some jobs new, changed, as they are, or gone; perhaps another quota."""
        rng = self.rng
        texts: list[str] = []
        dropped: list[str] = []
        for name in rng.sample(NAMES, rng.randint(1, 3)):
            old = self.wishes.get(name)
            if old is not None and rng.random() < 0.25:
                del self.wishes[name]
                dropped.append(name)
                continue
            if old is None or rng.random() < 0.7:
                kind = old.type if old else rng.choice(TYPES)
                self.wishes[name] = Wish.random(rng, kind)
            texts.append(self.wishes[name].text(name))
        if rng.random() < 0.4:
            texts.append(quota(rng.choice((2, 4, 9))))
        jobs = {job.name: job for job in self.client.list(Job, namespace=SPACE)}
        return SetRequest(
            documents=tuple(DocumentText(text=t, source=f"{i}.yaml") for i, t in enumerate(texts)),
            inventory=tuple(
                InventoryEntry(kind="Job", namespace=SPACE, name=n, uid=jobs[n].metadata.uid)
                for n in dropped
            ),
            owner=OWNER,
            prune=True,
        )

    def live(self) -> dict[str, Execution]:
        """What is to run, by name."""
        return {
            e.name: e
            for e in self.client.list(Execution, namespace=SPACE)
            if e.spec.desired is Desired.RUN and not e.is_final
        }

    def waiting(self) -> dict[str, int]:
        """How many slots of each job find no place."""
        found = {}
        for job in self.client.list(Job, namespace=SPACE):
            slots = max(job.status.slots.waiting, 1)
            found[job.name] = slots if waits_for(job) in ("Capacity", "Quota") else 0
        return found

    def rolling(self) -> bool:
        """Whether a rollout waits for room."""
        return any(waits_for(j) == "Rollout" for j in self.client.list(Job, namespace=SPACE))

    def rest(
        self, names: set[str] | None = None, queued: dict[str, int] | None = None
    ) -> tuple[dict[str, Execution], dict[str, int]]:
        """What there is once nothing moves: all jobs are looked at, what is to run does, and no
        rollout is under way; one that waits for room may do so for ever. What is not yet as
        expected (`names` to run, `queued` slots of jobs) is waited for: on a busy machine nothing
        may move for a while."""
        last: object = None
        since = began = time.monotonic()
        while time.monotonic() - began < SETTLE_SECONDS:
            time.sleep(0.1)
            jobs = list(self.client.list(Job, namespace=SPACE))
            live, waits = self.live(), self.waiting()
            is_done = all(job.is_observed and not job.is_deleting for job in jobs) and all(
                e.phase is Phase.RUNNING for e in live.values()
            )
            is_calm = all(waits_for(job) not in MOVING for job in jobs)
            state = (sorted(live), waits, [job.status.slots for job in jobs])
            if state != last or not is_done:
                last, since = state, time.monotonic()
                continue
            patience = 1.0 if is_calm else 3 * HEALTHY_SECONDS
            if names not in (None, {*live}) or not (queued or {}).items() <= waits.items():
                patience = LATE_SECONDS
            if time.monotonic() - since > patience:
                return live, waits
        told = [(job.name, job.status.waiting) for job in jobs]
        raise AssertionError(f"it does not come to rest: {last} {told}")


def waits_for(job: Job) -> str:
    """In one word; empty: for nothing."""
    return job.status.waiting.what if job.status.waiting else ""


def told(plan: ChangePlan) -> tuple[set[str], Facts, set[str], dict[str, int]]:
    """What a plan lists: names and places of what starts, names of what stops, slots that wait."""
    starts: set[str] = set()
    places: Facts = Counter()
    stops: set[str] = set()
    waits: dict[str, int] = {}
    for item in plan.objects:
        assert item.executions_omitted == 0
        for execution in item.executions:
            if execution.action == "stop":
                stops.add(execution.execution)
                continue
            starts.add(execution.execution)
            places[item.name, execution.node] += 1
            if execution.replaces:
                stops.add(execution.replaces)
        if item.kind == "Job" and item.action not in ("delete", "affected"):
            waits[item.name] = item.queued.slots if item.queued else 0
    return starts, places, stops, waits


@pytest.mark.timeout(300)
def test_what_a_plan_lists_is_what_happens(cluster: Cluster) -> None:
    with Client(cluster.server) as client:
        fleet = Fleet(client, Random(6))
        client.apply_set(SetRequest(documents=(DocumentText(text=quota(9)),), owner=OWNER))
        started = exact = 0
        for number in range(ROUNDS):
            before, idle = fleet.rest()
            wishes = dict(fleet.wishes)
            asked = fleet.change()
            plan = client.plan(asked)
            assert plan.complete
            starts, places, stops, waits = told(plan)
            if stops and any((*idle.values(), *waits.values(), fleet.rolling())):
                # Who gets the room that becomes free is a matter of who is heard first.
                fleet.wishes = wishes
                continue
            client.apply_set(asked.but(token=plan.token))
            after, left = fleet.rest({*before} - stops | starts, waits)
            new = after.keys() - before.keys()
            context = (
                f"round {number}: {plan.model_dump_json(by_alias=True, exclude_defaults=True)}"
            )
            assert new == starts, context
            if not stops and len({job for job, _ in places}) == 1:
                # Else it is a matter of who is heard first which of two equal nodes gets which.
                exact += 1
                found = Counter((after[n].spec.job, after[n].spec.node) for n in new)
                assert found == places, context
            assert before.keys() - after.keys() == stops, context
            assert {name: left[name] for name in waits} == waits, context
            assert client.plan(asked.but(inventory=())).changes is False, "applying it is all"
            started += len(starts)
        assert min(started, exact) > 0, (started, exact)
