"""Random edits, renames, deletions, broken files, checkouts, users, restarts and kills between any
two writes: in the end the objects are exactly what the directory says, and on the way nothing was
deleted that nobody wished gone."""

import asyncio
import contextlib
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bacalhau_api.meta import Ref
from bacalhau_api.provenance import owner_of
from bacalhau_api.v1.source import ClaimPhase
from tests.support.gitops import KilledError, Yard, manifest, with_image

T = TypeVar("T")
NAMES = tuple("abcdef")
FILES = ("one.yaml", "two.yaml", "sub/three.yaml", "four.yml")
BROKEN = ("", "kind: [", "kind: Job\n", "{}")

names = st.sampled_from(NAMES)
files = st.sampled_from(FILES)
images = st.sampled_from(("one", "two"))
kills = st.one_of(st.none(), st.tuples(st.integers(0, 3), st.booleans()))
"""What follows an edit: an undisturbed pass, or one that is killed at some write."""


class Fleet(RuleBasedStateMachine):
    """One directory, its source, and everybody who can get in the way."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.yard = Yard()
        self.tree = self.run(self.yard.add_source())
        self.declared: dict[str, dict[str, str]] = {}  # file to name to image
        self.broken: dict[str, str] = {}
        self.snapshots = [self.declared]
        self.theirs: dict[str, str] = {}  # uid of objects that users made, to name
        self._edit("one.yaml", {"a": "one", "b": "one", "c": "one"})
        self._edit("two.yaml", {"d": "one"})
        self.one_pass()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    # -- the directory -----------------------------------------------------------------------------

    @rule(file=files, name=names, image=images, kill=kills)
    def declare(self, file: str, name: str, image: str, kill: tuple[int, bool] | None) -> None:
        self._drop(name)
        self._edit(file, {**self.declared.get(file, {}), name: image})
        self._follow(kill)

    @rule(forgotten=st.sets(names, min_size=1, max_size=3), kill=kills)
    def forget(self, forgotten: set[str], kill: tuple[int, bool] | None) -> None:
        for name in forgotten:
            self._drop(name)
        self._follow(kill)

    @rule(old=files, new=files, kill=kills)
    def rename(self, old: str, new: str, kill: tuple[int, bool] | None) -> None:
        content = self.declared.get(old)
        if content and old != new and not self.declared.get(new):
            self._edit(old, {})
            self._edit(new, content)
        self._follow(kill)

    @rule(file=files, text=st.sampled_from(BROKEN), name=names)
    def break_file(self, file: str, text: str, name: str) -> None:
        self.broken[file] = text
        self._drop(name)
        self._follow(None)

    @rule()
    def mend(self) -> None:
        self.broken = {}
        self._write()

    @rule()
    def commit(self) -> None:
        self.snapshots = [*self.snapshots, dict(self.declared)][-5:]

    @rule(data=st.data(), kill=kills)
    def check_out(self, data: st.DataObject, kill: tuple[int, bool] | None) -> None:
        self.declared = dict(data.draw(st.sampled_from(self.snapshots)))
        self._write()
        self._follow(kill)

    @rule()
    def unmount(self) -> None:
        self.tree.absent = "gone"
        self.one_pass()

    @rule()
    def mount(self) -> None:
        self.tree.absent = ""

    @precondition(lambda self: self.yard.status().freeze is not None)
    @rule(kill=kills)
    def approve(self, kill: tuple[int, bool] | None) -> None:
        freeze = self.yard.status().freeze
        if freeze is not None and freeze.digest and not self.tree.absent and not self.broken:
            self.run(self.yard.approve())
            self._approved_pass(kill)

    def _drop(self, name: str) -> None:
        for file, content in list(self.declared.items()):
            if name in content:
                self._edit(file, {k: v for k, v in content.items() if k != name})

    def _edit(self, file: str, content: dict[str, str]) -> None:
        self.declared = {k: v for k, v in self.declared.items() if k != file}
        if content:
            self.declared[file] = content
        self._write()

    def _write(self) -> None:
        texts = {
            file: "---\n".join(manifest(name, image) for name, image in content.items())
            for file, content in self.declared.items()
        }
        self.tree.files = texts | self.broken

    # -- users -------------------------------------------------------------------------------------

    @rule(name=names, image=images)
    def user_edits(self, name: str, image: str) -> None:
        job = self.yard.jobs().get(name)
        if job is not None and job.metadata.uid not in self.theirs:
            self.run(self.yard.put(with_image(job, image)))
        self.one_pass()

    @rule(name=names)
    def user_deletes(self, name: str) -> None:
        if name in self.yard.jobs():
            self.theirs.pop(self.yard.job(name).metadata.uid, None)
            self.run(self.yard.drop(self.yard.job(name).ref))

    @rule(name=names)
    def user_replaces(self, name: str) -> None:
        self.user_deletes(name)
        self.user_makes(name)

    @rule(name=names)
    def user_makes(self, name: str) -> None:
        if self.run(self.yard.store.get(Ref("Job", "default", name))) is None:
            self.run(self.yard.user_applies(manifest(name, "theirs")))
            self.theirs[self.yard.job(name).metadata.uid] = name

    @rule(name=names)
    def job_ends(self, name: str) -> None:
        job = self.yard.jobs().get(name)
        if job is not None and job.metadata.uid not in self.theirs:
            self.run(self.yard.finish(name))

    # -- processes ---------------------------------------------------------------------------------

    @rule()
    def one_pass(self) -> None:
        """Nothing goes while anything about the directory is not known."""
        before = {name: job.metadata.uid for name, job in self.yard.jobs().items()}
        is_whole = not self.tree.absent and not self.broken and bool(self.tree.files)
        self.run(self.yard.once())
        if not is_whole:
            after = {name: job.metadata.uid for name, job in self.yard.jobs().items()}
            assert before.items() <= after.items()

    def _approved_pass(self, kill: tuple[int, bool] | None) -> None:
        if kill is None:
            self.run(self.yard.once())
        else:
            self._follow(kill)

    def _follow(self, kill: tuple[int, bool] | None) -> None:
        if kill is None:
            self.one_pass()
            return
        store = self.yard.store
        store.lives, store.kills_after = kill
        with contextlib.suppress(KilledError, BaseExceptionGroup):
            self.run(self.yard.once())
        store.lives = None
        self.run(self.yard.restart())

    @rule()
    def restart(self) -> None:
        self.run(self.yard.restart())

    @rule()
    def deletions_end(self) -> None:
        self.run(self.yard.finish_deletions())

    @rule()
    def a_day_passes(self) -> None:
        self.run(self.yard.pass_time(timedelta(days=1, minutes=1)))
        self.run(self.yard.tidy_claims())

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def what_users_made_is_theirs(self) -> None:
        if not hasattr(self, "yard"):
            return
        jobs = self.yard.jobs()
        for uid, name in self.theirs.items():
            assert jobs[name].metadata.uid == uid
            assert self.yard.images()[name] == "theirs"

    @invariant()
    def whatever_carries_the_mark_is_claimed(self) -> None:
        if not hasattr(self, "yard"):
            return
        claims = self.yard.claims()
        for name, job in self.yard.jobs().items():
            if owner_of(job) == "source/prod":
                assert claims[name].spec.uid == job.metadata.uid
                assert claims[name].status.phase is ClaimPhase.HELD

    @precondition(lambda self: hasattr(self, "yard"))
    @rule()
    def settle(self) -> None:
        self._settle()

    def _settle(self) -> None:
        """Everything is repaired and approved; then the objects are what the directory says."""
        self.mount()
        self.mend()
        self.run(self.yard.restart())
        for _ in range(4):
            status = self.run(self.yard.sync())
            if status.freeze is None:
                break
            self.run(self.yard.approve())
        assert status.freeze is None
        wanted = {name: image for c in self.declared.values() for name, image in c.items()}
        theirs = set(self.theirs.values())
        for name in theirs:
            wanted.pop(name, None)
        found = {name: image for name, image in self.yard.images().items() if name not in theirs}
        for record in self.yard.state.cache.list("RetiredJob"):
            # Has run to its end before its file went and came back: not again.
            if record.name in wanted and record.name not in found:
                image = record.spec.job.task.engine.params["image"]  # type: ignore[attr-defined]
                assert wanted.pop(record.name) == image
        assert found == wanted
        refused = {p.object.rpartition("/")[2] for p in status.problems}
        assert refused == {n for c in self.declared.values() for n in c} & theirs
        before = self.run(self.yard.store.list()).cursor
        self.run(self.yard.restart())
        self.run(self.yard.sync())
        assert self.run(self.yard.store.list()).cursor == before  # and then nothing is written

    def teardown(self) -> None:
        if hasattr(self, "yard"):
            self._settle()
            self.loop.close()


Fleet.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestFleet = Fleet.TestCase
