"""Plays random operations of people and mishaps of processes, and looks at it in between."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from bacalhau.client.sync import Client
from bacalhau.gitops import wire
from bacalhau_api.errors import BacalhauError
from bacalhau_api.jobfile import parse_manifests
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.source import Claim, SourcePhase
from tests.e2e.gitrounds.desk import Desk, manifest
from tests.e2e.gitrounds.fleet import DESK, PUSHED, Fleet
from tests.e2e.gitrounds.truth import documents, manifest_files, read
from tests.e2e.gitrounds.verdict import Ledger, strangers
from tests.support.repo import Repo

SETTLE_SECONDS = 120.0
QUIET_SECONDS = 1.5
GIT_SECONDS = 300.0
"""For one git command: a push runs a hook, which starts a process, on a machine that is busy."""


class DriftLeftError(Exception):
    """What is stored does not become what the directories say."""


class Campaign:
    """One fleet, worked on until told otherwise. `mishaps` is how often those happen against the
    usual. `counts` says what was done how often."""

    def __init__(self, root: Path, seed: str, mishaps: float = 1.0) -> None:
        self.rng = random.Random(seed)
        self._often = mishaps
        self.root = root
        self.fleet = Fleet(root)
        self.counts: Counter[str] = Counter()
        self.settled: list[float] = []
        self.strange = list[str]()
        self._wrong = list[str]()
        work = Repo(root / "work", seconds=GIT_SECONDS)
        work.git("remote", "add", "origin", str(self.fleet.pushed.root))
        self.pushing = Desk(work, "p", self.rng, lambda: None)
        self.sitting = Desk(
            Repo(root / "desk", seconds=GIT_SECONDS), "d", self.rng, self._note_desk
        )
        self.pushed = Ledger(PUSHED, "p", self.pushing.kept)
        self.desk = Ledger(DESK, "d", self.sitting.kept)
        self._note_desk()
        self._push()

    def start(self) -> None:
        """Everything runs, and is as the directories say."""
        self.fleet.start()
        self.settle()

    @property
    def wrong(self) -> list[str]:
        """What should not have happened."""
        return [*self.pushed.wrong, *self.desk.wrong, *self._wrong]

    # -- what happens ----------------------------------------------------------------------------

    def step(self) -> str:
        """One thing that happens, by chance; its name."""
        choices: list[tuple[float, str, Callable[[], None]]] = []
        for desk, name in ((self.pushing, "push"), (self.sitting, "desk")):
            choices += [
                (weight, f"{name}.{work.__name__}", work) for weight, work in desk.operations()
            ]
        choices += [(w * self._often, f.__name__, f) for w, f in self._mishaps()]
        weights = [weight for weight, _, _ in choices]
        (_, name, work), *_ = self.rng.choices(choices, weights)
        work()
        self.counts[name] += 1
        if name.startswith("desk."):
            self._note_desk()
        elif name.startswith("push.") and self.rng.random() < 0.6:
            self._push()
        time.sleep(self.rng.choice((0.0, 0.0, 0.05, 0.2, 0.5, 1.0)))
        return name

    def _mishaps(self) -> list[tuple[float, Callable[[], None]]]:
        fleet = self.fleet
        return [
            (1.2, fleet.kill_orchestrator),
            (0.5, fleet.restart_orchestrator),
            (0.8, fleet.kill_nats),
            (2.0, fleet.kill_runner),
            (0.8, fleet.kill_agent),
            (0.4, fleet.kill_all),
            (0.6, self.runner_is_stopped_for_a_while),
            (0.6, self.the_repository_is_away),
            (0.6, self.hook_on_or_off),
            (3.0, self.user_edits_a_label),
            (1.5, self.user_deletes_a_job),
            (1.5, self.user_has_the_name_already),
            (1.0, self.two_directories_want_one),
            (1.0, self.suspended_for_a_moment),
        ]

    def runner_is_stopped_for_a_while(self) -> None:
        """SIGSTOP."""
        self.fleet.freeze_runner(self.rng.uniform(0.1, 4.0))

    def the_repository_is_away(self) -> None:
        """The bare repository is somewhere else for a moment."""
        root = self.fleet.pushed.root
        away = root.with_name("away.git")
        root.rename(away)
        time.sleep(self.rng.uniform(0, 2.0))
        away.rename(root)

    def hook_on_or_off(self) -> None:
        """The hook that refuses what cannot be read."""
        self.fleet.hook(is_on=self.rng.random() < 0.5)

    def user_edits_a_label(self) -> None:
        """By hand, of what a directory declares: it is put back."""
        with self._as_user() as client:
            jobs = [j for j in client.list(Job) if not j.is_deleting]
            if jobs := [j for j in jobs if "theirs" not in j.name]:
                job = self.rng.choice(sorted(jobs, key=lambda j: j.name))
                client.apply(job.with_meta(labels={"team": "drift"}))

    def user_deletes_a_job(self) -> None:
        """By hand: it comes back."""
        with self._as_user() as client:
            jobs = [j for j in client.list(Job) if not j.is_deleting]
            if jobs := [j for j in jobs if "theirs" not in j.name and "keep" not in j.name]:
                job = self.rng.choice(sorted(jobs, key=lambda j: j.name))
                ledger = self.pushed if job.name.startswith("p") else self.desk
                ledger.user_deleted(job.name, job.metadata.uid)
                client.delete(Job, job.name)

    def user_has_the_name_already(self) -> None:
        """A user's job, and a file that declares one of its name: it is left alone."""
        name = f"theirs-{len(self.strange)}"
        with self._as_user() as client:
            (document,) = parse_manifests(manifest(name, "theirs", "a"))
            assert isinstance(document.resource, Job)
            client.apply(document.resource)
            self.strange.append(name)
            self.sitting.repo.put("jobs/theirs.yaml", manifest(name, "mine", "b"))
            self._note_desk()

    def two_directories_want_one(self) -> None:
        """The desk declares what belongs to the other."""
        name = self.rng.choice(sorted(self.pushing.kept))
        self.sitting.repo.put("jobs/claimed.yaml", manifest(name, "stolen", "b"))
        self._note_desk()

    def suspended_for_a_moment(self) -> None:
        """With an end."""
        asked = wire.SuspendRequest(seconds=self.rng.uniform(0.2, 3.0))
        with self._as_user() as client:
            client.send(wire.verb(self.rng.choice((PUSHED, DESK)), "suspend", asked))

    @contextlib.contextmanager
    def _as_user(self) -> Iterator[Client]:
        """What a user does is refused where somebody else was faster."""
        try:
            with self.fleet.client() as client:
                yield client
        except BacalhauError:
            self.counts["refused"] += 1

    # -- what the directories say ----------------------------------------------------------------

    def _note_desk(self) -> None:
        self.desk.note(read(self.sitting.root))

    def _push(self) -> None:
        """Commit and push. What is pushed is noted first: it may be applied at once."""
        self.pushing.commit()
        commit = self.pushing.repo.git("rev-parse", "HEAD")
        state = read(self.pushing.root)
        try:
            with self._own_path():
                self.pushing.repo.git("push", "-q", "--force", "origin", "HEAD:main")
        except subprocess.CalledProcessError as error:
            # The hook refuses what cannot be read, and what is declared twice.
            if state.is_whole and None not in state.values.values():
                self._wrong.append(f"a push was refused: {error.stderr}")
            return
        self.pushed.note(state, commit)

    @contextlib.contextmanager
    def _own_path(self) -> Iterator[None]:
        old = os.environ["PATH"]
        os.environ["PATH"] = f"{self.fleet.bin}{os.pathsep}{old}"
        try:
            yield
        finally:
            os.environ["PATH"] = old

    # -- looking at it ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Everything is mended and approved; then what is stored is what the directories say, and
        stays so, and what has happened on the way was right. Raises DriftLeftError."""
        self.fleet.revive()
        self.sitting.tidy()
        self._give_back()
        self._note_desk()
        self.pushing.tidy()
        self._push()
        began = time.monotonic()
        while found := self._left():
            if time.monotonic() - began > SETTLE_SECONDS:
                raise DriftLeftError("; ".join(found))
            time.sleep(0.1)
        self.settled.append(time.monotonic() - began)
        with self.fleet.client() as client:
            before = {c.ref: c.metadata.resource_version for c in client.list(Claim)}
            time.sleep(QUIET_SECONDS)
            after = {c.ref: c.metadata.resource_version for c in client.list(Claim)}
            if before != after:
                self._wrong.append(f"claims are still written: {before} {after}")
            for ledger in (self.pushed, self.desk):
                ledger.look_back(client)
            self._wrong += strangers(client, self.strange[-20:])

    def _give_back(self) -> None:
        """The desk declares its own jobs alone, wherever the files were moved in the meantime."""
        root = self.sitting.root
        for path in list(manifest_files(root)):
            jobs = documents((root / path).read_text()) or []
            if not all(name.startswith(f"{self.sitting.prefix}-") for name, _, _ in jobs):
                (root / path).unlink()
        self.sitting.commit()

    def _left(self) -> list[str]:
        """What is not yet as it is to be."""
        found = []
        try:
            for ledger in (self.pushed, self.desk):
                state, source = ledger.said[-1].state, self.fleet.source(ledger.source)
                status = source.status
                freeze = status.freeze
                held = {o.rpartition("/")[2] for o in freeze.objects} if freeze else set()
                if freeze is not None and freeze.digest and not held & state.values.keys():
                    with self.fleet.client() as client, contextlib.suppress(BacalhauError):
                        asked = wire.ApproveRequest(digest=freeze.digest)
                        client.send(wire.verb(ledger.source, "approve", asked))
                commit = ledger.said[-1].commit
                if status.phase is not SourcePhase.SYNCED or status.problems:
                    found.append(f"{ledger.source} is {status.phase}: {status.message}")
                elif commit and status.revision_applied != commit:
                    found.append(f"{ledger.source} has applied {status.revision_applied}")
                with self.fleet.client() as client:
                    found += ledger.differences(client, state)
        except BacalhauError as error:
            found.append(str(error))
        return found

    def close(self) -> list[str]:
        """Stop everything; what is left of it."""
        return self.fleet.close()

    def tail(self) -> str:
        """The end of the logs."""
        return f"{self.fleet.cluster.orchestrator.tail(3000)}\n{self.fleet.runner.tail()}"


def drop(root: Path) -> None:
    """Remove the data of a campaign."""
    shutil.rmtree(root, ignore_errors=True)
