"""Holds what is stored, and what the history tells, against what the directories have said."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from bacalhau.client.sync import Client
from bacalhau.replies import HistoryItem
from bacalhau_api.errors import NotFoundError
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.retired import RetiredJob
from tests.e2e.gitrounds.truth import State

HISTORY_MAX = 1000
LATE = timedelta(seconds=45)
"""A deletion may be decided on what a directory said so long ago: the process that read it may have
been stopped, or its server away."""


@dataclass(slots=True)
class Said:
    """One moment of a directory: from when on, and under which commit."""

    state: State
    since: datetime
    commit: str = ""


@dataclass(slots=True)
class Run:
    """One generation of one incarnation of a job."""

    uid: str
    generation: int
    value: str
    by_user: bool = False
    completed: bool = False
    pruned: bool = False
    removed_by_user: bool = False


@dataclass(slots=True)
class Ledger:
    """All that one directory has said, and what has become of its jobs."""

    source: str
    prefix: str
    kept: frozenset[str]
    said: list[Said] = field(default_factory=list)
    runs: dict[str, list[Run]] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    """uids of jobs that users deleted."""
    pruned: int = 0
    wrong: list[str] = field(default_factory=list)
    _seen: dict[str, int] = field(default_factory=dict)
    _wishes: dict[str, list[str | None]] = field(default_factory=dict)

    def note(self, state: State, commit: str = "") -> None:
        """The directory lies still, and says this."""
        self.said.append(Said(state, datetime.now(UTC), commit))
        for name, value in state.values.items():
            if not name.startswith(f"{self.prefix}-"):
                continue  # it belongs to somebody else
            wishes = self._wishes.setdefault(name, [])
            if value is not None and wishes[-1:] != [value]:
                wishes.append(value)
        if state.is_whole:
            for name in self._wishes.keys() - state.values.keys():
                if self._wishes[name][-1] is not None:
                    self._wishes[name].append(None)

    def user_deleted(self, name: str, uid: str) -> None:
        """By hand: what is declared comes back, and runs."""
        self.removed.add(uid)
        last = self.said[-1].state.values.get(name)
        self._wishes.setdefault(name, []).extend([None, last])

    # -- how things stand --------------------------------------------------------------------------

    def differences(self, client: Client, state: State) -> list[str]:
        """What is not as the directory says."""
        jobs = {
            j.name: j
            for j in client.list(Job)
            if j.name.startswith(f"{self.prefix}-") and not j.is_deleting
        }
        over = {r.name: r.as_job() for r in client.list(RetiredJob)}
        found = [f"{name} is there" for name in jobs.keys() - state.values.keys()]
        for name, value in state.values.items():
            job = jobs.get(name) or over.get(name)
            if job is None:
                found.append(f"{name} is not there")
            elif value_of(job) != value:
                found.append(f"{name} is to run {value}, not {value_of(job)}")
            elif name in jobs and job.metadata.labels.get("team") != state.labels[name]:
                found.append(f"{name} has another label")
            elif not job.status.phase.is_final:
                found.append(f"{name} is {job.status.phase}")
        return found

    # -- what has happened ------------------------------------------------------------------------

    def look_back(self, client: Client) -> None:
        """Read what the history has got since, and judge it."""
        for name in sorted(self._wishes):
            for item in history(client, name):
                if item.revision <= self._seen.get(name, 0):
                    continue
                self._seen[name] = item.revision
                if item.object is not None:
                    self.saw(name, item.actor, Job.model_validate_json(json.dumps(item.object)))
                if item.reason == "Pruned":
                    self.saw_pruning(name, item.uid, item.actor, item.time, item.message)
        self.judge()

    def judge(self) -> None:
        """Judge the runs that were seen."""
        for name, runs in self.runs.items():
            self._judge_runs(name, runs)

    def saw(self, name: str, actor: str, job: Job) -> None:
        """One state of a job, in the order in which they were stored."""
        runs = self.runs.setdefault(name, [])
        uid, generation = job.metadata.uid, job.metadata.generation
        if not runs or (runs[-1].uid, runs[-1].generation) != (uid, generation):
            runs.append(Run(uid, generation, value_of(job), by_user=actor.startswith("user:")))
        is_over = job.status.phase.is_final and job.status.observed_generation == generation
        runs[-1].completed |= is_over
        runs[-1].removed_by_user |= uid in self.removed

    def saw_pruning(self, name: str, uid: str, actor: str, at: datetime, words: str) -> None:
        """A job was deleted in the name of the directory."""
        self.pruned += 1
        if actor != f"source/{self.source}":
            self.wrong.append(f"{name} was pruned by {actor}")
        if name in self.kept:
            self.wrong.append(f"{name} was pruned, which was always declared: {words}")
        if not any(_lacks(said.state, name) for said in self._meant(at, words)):
            self.wrong.append(f"{name} was pruned at {at} though it was declared: {words}")
        for run in self.runs.get(name, ()):
            run.pruned |= run.uid == uid

    def _meant(self, at: datetime, words: str) -> list[Said]:
        """What may have led to a deletion: the commit that it names, or what was said then."""
        if self.said[0].commit:
            return [s for s in self.said if s.commit and s.commit[:12] in words]
        ends = [later.since for later in self.said[1:]] + [datetime.max.replace(tzinfo=UTC)]
        return [
            s
            for s, end in zip(self.said, ends, strict=True)
            if s.since <= at + timedelta(seconds=1) and end >= at - LATE
        ]

    def _judge_runs(self, name: str, runs: list[Run]) -> None:
        """They are what the directory asked for, in its order, and nothing ran again that was
        over."""
        if name in self.kept and len(runs) > 1:
            self.wrong.append(f"{name} ran again, which never changed: {runs}")
        wishes: Iterator[str | None] = iter(self._wishes.get(name, ()))
        met: str | None = None
        for run in runs:
            if run.by_user:  # an edit of the label that came just after another of the value
                wishes = itertools.chain([met], wishes)
                continue
            met = next((wish for wish in wishes if wish == run.value), None)
            if met is None:
                self.wrong.append(f"{name} ran {run.value} out of turn: {runs}")
                break
        for before, after in itertools.pairwise(runs):
            is_over = before.completed and before.pruned and not before.removed_by_user
            if is_over and before.value == after.value:
                self.wrong.append(f"{name} ran {after.value} again after it was over: {runs}")


def value_of(job: Job) -> str:
    """What its run depends on."""
    return str(job.spec.task.env.get("VALUE"))


def history(client: Client, name: str) -> tuple[HistoryItem, ...]:
    """All that is known of jobs of a name; nothing where there never was one."""
    try:
        return client.history(Job, name, limit=HISTORY_MAX, objects=True)
    except NotFoundError:
        return ()


def strangers(client: Client, names: list[str]) -> list[str]:
    """What was done to jobs that users had made before a directory declared their names."""
    wrong = []
    for name in names:
        items = history(client, name)
        for item in items:
            if item.uid != items[0].uid:
                break  # its own time was over: from then on the name was free
            job = Job.model_validate_json(json.dumps(item.object)) if item.object else None
            if item.actor.startswith("source/") or (job and value_of(job) != "theirs"):
                wrong.append(f"{name}, a user's, was changed: {item.actor} {item.reason}")
    return wrong


def _lacks(state: State, name: str) -> bool:
    return state.is_whole and name not in state.values
