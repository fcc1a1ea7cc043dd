"""Tests the tester: bugs that are planted on purpose, each of which the world must find.

Every one is a mistake that somebody could make, or made elsewhere. `python -m
tests.simulation.planted` shows for each how many seeds it takes until an invariant breaks.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bacalhau_api.errors import BacalhauError, ConflictError, TransientError
from bacalhau_api.meta import Contact, Ref, Resource
from bacalhau_api.v1.execution import Execution, Phase, Report
from bacalhau_api.wire import Applied, Changes
from bacalhau_controllers.controller import SWEEP_TICKS, Controller
from bacalhau_controllers.execution import plan as execution_plan
from bacalhau_controllers.execution import reconciler as execution_reconciler
from bacalhau_controllers.gateway import Gateway
from bacalhau_controllers.inbox import FactInbox
from bacalhau_controllers.job import JobReconciler
from bacalhau_controllers.job import look as job_look
from bacalhau_controllers.job import reconciler as job_reconciler
from bacalhau_controllers.job import retry as job_retry
from bacalhau_controllers.job import slots as job_slots
from bacalhau_controllers.job.draft import Draft
from bacalhau_controllers.job.look import Sight
from bacalhau_controllers.job.owned import SlotView
from bacalhau_controllers.manager import Manager
from bacalhau_controllers.placement import NodeTable, rules
from bacalhau_controllers.retention.plan import RetentionSettings
from bacalhau_controllers.runner import assign, machine, transitions
from bacalhau_controllers.runner.agent import Agent
from bacalhau_controllers.runner.commit import GroupCommit
from bacalhau_controllers.runner.ports import Observation, RunPhase
from bacalhau_controllers.runner.session import Session
from bacalhau_controllers.runner.state import Instant, Stage, new_state
from bacalhau_controllers.runner.upkeep import Upkeep
from bacalhau_controllers.state import State
from bacalhau_controllers.store import Why, Write
from bacalhau_controllers.workqueue import WorkQueue
from tests.simulation.world import Faults, World
from tests.simulation.world.world import Failure
from tests.support.arguments import at_least_one

SEEDS_MAX = 1000

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Planted:
    """One bug. `faults` are those that bring it to light, in the words of `Faults.parse`."""

    name: str
    plant: Callable[[Patch], None]
    faults: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """How a bug came to light; `seeds` were needed. `invariant` is empty if it did not."""

    seeds: int
    invariant: str = ""
    words: str = ""


def hunt(bug: Planted, seeds_max: int = SEEDS_MAX) -> Found:
    """Run seed after seed with the bug planted, until something is noticed."""
    for seed in range(seeds_max):
        with Patch.context() as patch:
            bug.plant(patch)
            faults = None if bug.faults is None else Faults.parse(bug.faults)
            try:
                World(seed, faults, fault_seconds=240.0).run()
            except Failure as failure:
                return Found(seed + 1, failure.invariant, str(failure).splitlines()[1])
    return Found(seeds_max)


# -- facts and their way ---------------------------------------------------------------------------


def _acknowledge_before_storing(patch: Patch) -> None:
    offer = FactInbox.offer

    async def early(self: FactInbox, *args: Any) -> None:
        async def store() -> None:
            with suppress(BacalhauError):
                await offer(self, *args)

        tasks = self.__dict__.setdefault("_early", set())
        task = asyncio.create_task(store())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(0)

    patch.setattr(FactInbox, "offer", early)


def _take_failed_facts_for_stored(patch: Patch) -> None:
    """A fact that could not be stored in time, or is refused, counts as stored."""
    offer = FactInbox.offer

    async def hopeful(self: FactInbox, *args: Any) -> None:
        with suppress(TransientError):
            await offer(self, *args)

    patch.setattr(FactInbox, "offer", hopeful)


def _acknowledge_the_whole_batch(patch: Patch) -> None:
    facts = Gateway.facts

    async def all_of_it(self: Gateway, batch: Any) -> Any:
        ack = await facts(self, batch)
        return ack.but(seq=batch.facts[-1].seq) if hasattr(ack, "seq") else ack

    patch.setattr(Gateway, "facts", all_of_it)


def _drop_acknowledgements(patch: Patch) -> None:
    facts = Gateway.facts

    async def silent(self: Gateway, batch: Any) -> Any:
        answer = await facts(self, batch)
        return answer.but(seq=batch.facts[0].seq - 1) if hasattr(answer, "seq") else answer

    patch.setattr(Gateway, "facts", silent)


def _lose_the_outbox(patch: Patch) -> None:
    recover = Agent._recover

    async def forgetful(self: Agent) -> None:
        self.site.book.facts.clear()
        await recover(self)

    patch.setattr(Agent, "_recover", forgetful)
    # Or what the orchestrator's list lacks would be told again.
    patch.setattr(assign, "_tell_again", lambda orders, book, assignments: None)


def _newest_report_wins(patch: Patch) -> None:
    def newest(old: Report | None, new: Report) -> Report:
        return new

    patch.setattr(execution_plan, "merge_report", newest)


def _lost_pushes_are_ignored(patch: Patch) -> None:
    async def send(self: Gateway, session: Any) -> None:
        while True:
            await session.wake.wait()
            session.wake.clear()
            while session.dirty:
                changes = self._take(session)
                try:
                    await self._transport.push(changes, 10.0)
                except BacalhauError:
                    session.number -= 1

    patch.setattr(Gateway, "_send", send)


# -- writes ----------------------------------------------------------------------------------------


def _swallow_conflicts(patch: Patch) -> None:
    commit = State.commit

    async def careless(self: State, writes: Sequence[Write], why: Why) -> Any:
        try:
            return await commit(self, writes, why)
        except ConflictError:
            return tuple(None for _ in writes)

    patch.setattr(State, "commit", careless)


def _write_without_fence(patch: Patch) -> None:
    async def unfenced(self: State, writes: Sequence[Write], why: Why) -> Any:
        return await self.store.commit(writes, why)

    patch.setattr(State, "commit", unfenced)


def _keep_finished_jobs_for_no_time(patch: Patch) -> None:
    usual = RetentionSettings.__init__.__defaults__
    assert usual is not None
    patch.setattr(RetentionSettings.__init__, "__defaults__", (5.0, *usual[1:]))


# -- jobs ------------------------------------------------------------------------------------------


def _unknown_is_gone(patch: Patch) -> None:
    def gone(self: Sight, execution: Execution) -> bool:
        return execution.status.contact is not Contact.REACHABLE

    patch.setattr(Sight, "is_gone", gone)


def _ignore_acceptance(patch: Patch) -> None:
    look = job_look.look

    def forgetful(view: SlotView, sight: Sight) -> Any:
        return look(SlotView(view.slot, view.attempts), sight)

    for module in ("work", "rollout", "cleanup"):
        patch.setattr(f"bacalhau_controllers.job.{module}.look", forgetful)


def _accept_twice(patch: Patch) -> None:
    """A late result is accepted as well, beside the one that its slot holds."""
    finish = Draft.finish

    def generous(self: Draft, job: Any, **words: str) -> Any:
        for view in self.view.current.retried_views():
            for late in view.attempts if view.acceptance is not None else ():
                is_other = view.acceptance and view.acceptance.spec.execution != late.name
                if is_other and late.phase is Phase.SUCCEEDED:
                    second = job_slots.new_acceptance(self.job, late, self.now)
                    self.accept.append(second.with_meta(name=late.name))
        return finish(self, job, **words)

    patch.setattr(Draft, "finish", generous)


def _give_places_back_in_doubt(patch: Patch) -> None:
    """A commit without an answer is taken for one that did not happen."""
    settle = JobReconciler._settle_doubt

    async def hasty(self: JobReconciler, ref: Ref, *, is_over: bool = False) -> None:
        doubt = self._in_doubt.pop(ref, None)
        for key in doubt.keys if doubt is not None and not is_over else ():
            self.nodes.release(key)
        await settle(self, ref, is_over=is_over)

    patch.setattr(JobReconciler, "_settle_doubt", hasty)


def _forget_reservations(patch: Patch) -> None:
    patch.setattr(NodeTable, "reserve", lambda self, key, reservation: None)


def _release_lost_reservations(patch: Patch) -> None:
    apply = NodeTable._apply_execution

    def eager(self: NodeTable, old: Resource | None, new: Resource | None, now: float) -> None:
        is_silent = isinstance(new, Execution) and new.status.contact is not Contact.REACHABLE
        apply(self, old, None if is_silent and old is not None else new, now)

    patch.setattr(NodeTable, "_apply_execution", eager)


def _charge_system_faults(patch: Patch) -> None:
    end_of = job_retry.end_of

    def unfair(execution: Execution, retry: Any) -> Any:
        end = end_of(execution, retry)
        return job_retry.End.FAILED if end is job_retry.End.FAULT else end

    patch.setattr(job_retry, "end_of", unfair)
    patch.setattr(job_look, "end_of", unfair)


def _publish_without_accepting(patch: Patch) -> None:
    take = Draft.take_result

    def hasty(self: Draft, execution: Execution, *, publishes: bool) -> bool:
        taken = take(self, execution, publishes=publishes)
        if self.publish:
            self.accept.clear()
        return taken

    patch.setattr(Draft, "take_result", hasty)


def _losers_run_on(patch: Patch) -> None:
    stop = Draft.stop

    def lenient(
        self: Draft, execution: Execution, reason: str, *, superseded: bool = False
    ) -> None:
        if not superseded:
            stop(self, execution, reason)

    patch.setattr(Draft, "stop", lenient)


def _wait_for_nothing(patch: Patch) -> None:
    patch.setattr(Draft, "waiting", lambda self, *, since: None)


def _forget_timers_and_sweeps(patch: Patch) -> None:
    async def never(self: Controller) -> None:
        await asyncio.Event().wait()

    patch.setattr(WorkQueue, "add_after", lambda self, ref, seconds: True)
    patch.setattr(Controller, "sweep", never)


def _forget_everything_on_restart(patch: Patch) -> None:
    """A new leader waits for events, instead of looking at all there is; so do its sweeps."""

    def begin(self: Controller) -> None:
        self.queue.reset()
        self._buckets = [{} for _ in range(SWEEP_TICKS)]
        self._is_working = True

    patch.setattr(Controller, "begin", begin)


def _lead_without_catching_up(patch: Patch) -> None:
    async def at_once(self: Manager) -> None:
        await self._state.cache.wait_synced()

    patch.setattr(Manager, "_catch_up", at_once)


def _believe_the_cache_in_doubt(patch: Patch) -> None:
    async def from_cache(state: State, ref: Ref, kind: type[Resource]) -> Resource | None:
        return state.cache.get(ref)

    patch.setattr(job_reconciler, "ask_store", from_cache)


# -- silence ---------------------------------------------------------------------------------------


def _replace_too_soon(patch: Patch) -> None:
    patch.setattr(execution_plan, "LOCAL_STOP_MARGIN_SECONDS", -14.0)


def _go_on_when_cut_off(patch: Patch) -> None:
    patch.setattr(Upkeep, "check_cut_off", lambda self: 1.0)


def _compare_wall_clocks(patch: Patch) -> None:
    def elapsed(self: Instant, now: Instant) -> float | None:
        return (now.wall - self.wall).total_seconds()

    patch.setattr(Instant, "elapsed", elapsed)


def _unknown_is_failed(patch: Patch) -> None:
    plan = execution_plan.plan

    def rash(execution: Execution, reports: Any, view: Any, now: Any) -> Any:
        todo = plan(execution, reports, view, now)
        if todo.status.contact is not Contact.UNKNOWN:
            return todo
        end = Report(
            step=1_000_000, incarnation="?", phase=Phase.FAILED, reason="Unknown", finished_at=now
        )
        failed = todo.status.but(report=end, waiting=None)
        return type(todo)(failed, todo.is_orphan, todo.delete, todo.stop, todo.requeue_after)

    patch.setattr(execution_reconciler, "plan", rash)


def _removed_node_is_lost_at_once(patch: Patch) -> None:
    plan = execution_plan.plan

    def hasty(execution: Execution, reports: Any, view: Any, now: Any) -> Any:
        todo = plan(execution, reports, view, now)
        if todo.status.contact is Contact.UNKNOWN:
            lost = todo.status.but(contact=Contact.LOST, waiting=None)
            return type(todo)(lost, todo.is_orphan, todo.delete, todo.stop, todo.requeue_after)
        return todo

    patch.setattr(execution_reconciler, "plan", hasty)


# -- the node --------------------------------------------------------------------------------------


def _start_before_writing_it_down(patch: Patch) -> None:
    patch.setattr(machine, "_INTENTS", frozenset({Stage.DONE}))


def _answer_before_the_disk_has_it(patch: Patch) -> None:
    commit = GroupCommit.commit

    async def early(self: GroupCommit, entries: Any) -> None:
        self.book.apply([e for e in entries if type(e).__name__ != "PutFact"])
        tasks = self.__dict__.setdefault("_early", set())
        task = asyncio.create_task(commit(self, entries))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(0)

    patch.setattr(GroupCommit, "commit", early)


def _changes_outlive_their_session(patch: Patch) -> None:
    """What took longer to write down than its session lasted counts in the next one."""
    take = Session._on_changes

    async def late(self: Session, changes: Changes) -> Applied | None:
        was_current = self.id == changes.session
        applied = await take(self, changes)
        if applied is None and was_current and self.id not in ("", changes.session):
            self._seen = changes.number
        return applied

    patch.setattr(Session, "_on_changes", late)


def _reuse_run_numbers(patch: Patch) -> None:
    def again(case: Any, state: Any, event: object = None) -> Any:
        run = max(state.run, 1)
        return transitions._enter(
            case, state, Stage.STARTING, run=run, must_look=False, run_since=None
        )

    patch.setattr(transitions, "_start_next", again)


def _keep_what_nobody_wants(patch: Patch) -> None:
    for key, handler in list(machine.TRANSITIONS.items()):
        if handler is transitions.unassigned:
            patch.setitem(machine.TRANSITIONS, key, lambda case, state, event: state)


def _skip_the_sweep(patch: Patch) -> None:
    async def nothing(self: Upkeep) -> None:
        return

    patch.setattr(Upkeep, "sweep", nothing)


def _never_look_at_the_engine(patch: Patch) -> None:
    async def blind(self: Agent, uid: str) -> Observation | None:
        return Observation(RunPhase.ABSENT)

    patch.setattr(Agent, "_look", blind)


def _run_again_after_a_lost_ledger(patch: Patch) -> None:
    def fresh(execution: Execution, incarnation: str, now: Instant) -> Any:
        return new_state(incarnation, now)

    patch.setattr(assign, "lost_state", fresh)


def _ignore_stops(patch: Patch) -> None:
    for key, handler in list(machine.TRANSITIONS.items()):
        if handler is transitions.stop_requested and key[0] is Stage.RUNNING:
            patch.delitem(machine.TRANSITIONS, key)


def _a_vanished_run_has_succeeded(patch: Patch) -> None:
    interrupted = transitions._interrupted

    def hopeful(case: Any, state: Any, seen: Observation) -> Any:
        if case.is_long_running:
            return interrupted(case, state, seen)
        return state

    patch.setattr(transitions, "_interrupted", hopeful)


def _place_on_closed_nodes(patch: Patch) -> None:
    """Cordons, drains and rejections do not keep new work away."""
    for name in ("Membership", "Schedulable"):
        rule = replace(rules.RULES[name], check=lambda need, fact: rules.Finding(True, "is open"))
        patch.setitem(rules.RULES, name, rule)


BUGS: tuple[Planted, ...] = (
    Planted("acknowledge-before-storing", _acknowledge_before_storing, "store-refuses"),
    Planted("take-failed-facts-for-stored", _take_failed_facts_for_stored, "crash-orchestrator=6,"
            "lease-fails=0.5,store-outage=3"),
    Planted("acknowledge-the-whole-batch", _acknowledge_the_whole_batch, "store-outage=3,"
            "lease-fails=0.5,store-slow=0.3"),
    Planted("drop-acknowledgements", _drop_acknowledgements),
    Planted("lose-the-outbox", _lose_the_outbox, "crash-node=10,partition=5"),
    Planted("newest-report-wins", _newest_report_wins),
    Planted("lost-pushes-are-ignored", _lost_pushes_are_ignored, "net-loss=0.2"),
    Planted("swallow-conflicts", _swallow_conflicts),
    Planted("write-without-fence", _write_without_fence),
    Planted("keep-finished-jobs-for-no-time", _keep_finished_jobs_for_no_time),
    Planted("unknown-is-gone", _unknown_is_gone, "partition=6"),
    Planted("ignore-acceptance", _ignore_acceptance),
    Planted("accept-twice", _accept_twice, "partition=6,net-delay=0.2"),
    Planted("give-places-back-in-doubt", _give_places_back_in_doubt, "store-late-write=0.2,"
            "store-loses-answer=0.1"),
    Planted("forget-reservations", _forget_reservations),
    Planted("release-lost-reservations", _release_lost_reservations, "partition=6,node-off=3"),
    Planted("charge-system-faults", _charge_system_faults, "engine-loses-run=10,reboot-node=5,"
            "wipe-node=3"),
    Planted("publish-without-accepting", _publish_without_accepting),
    Planted("losers-run-on", _losers_run_on, "partition=6"),
    Planted("wait-for-nothing", _wait_for_nothing),
    Planted("forget-timers-and-sweeps", _forget_timers_and_sweeps),
    Planted("forget-everything-on-restart", _forget_everything_on_restart, "crash-orchestrator=6"),
    Planted("lead-without-catching-up", _lead_without_catching_up, "crash-orchestrator=6,"
            "watch-stalls=8"),
    Planted("believe-the-cache-in-doubt", _believe_the_cache_in_doubt, "store-loses-answer=0.2,"
            "watch-lags=0.3"),
    Planted("replace-too-soon", _replace_too_soon, "partition=6"),
    Planted("go-on-when-cut-off", _go_on_when_cut_off, "partition=6"),
    Planted("compare-wall-clocks", _compare_wall_clocks, "clock-step=40,partition=8"),
    Planted("unknown-is-failed", _unknown_is_failed, "partition=6"),
    Planted("unknown-is-lost", _removed_node_is_lost_at_once, "partition=6"),
    Planted("start-before-writing-it-down", _start_before_writing_it_down, "disk-slow=0.5"),
    Planted("answer-before-the-disk-has-it", _answer_before_the_disk_has_it, "crash-node=6,"
            "disk-slow=0.5"),
    Planted("changes-outlive-their-session", _changes_outlive_their_session, "disk-slow=0.3,"
            "flapping=10,partition=6"),
    Planted("reuse-run-numbers", _reuse_run_numbers),
    Planted("keep-what-nobody-wants", _keep_what_nobody_wants),
    Planted("skip-the-sweep", _skip_the_sweep, "wipe-node=6"),
    Planted("never-look-at-the-engine", _never_look_at_the_engine, "crash-node=6"),
    Planted("run-again-after-a-lost-ledger", _run_again_after_a_lost_ledger, "wipe-node=6"),
    Planted("ignore-stops", _ignore_stops),
    Planted("vanished-runs-go-on", _a_vanished_run_has_succeeded, "engine-loses-run=6"),
    Planted("place-on-closed-nodes", _place_on_closed_nodes, "operator=3"),
)  # fmt: skip


def main() -> int:
    """See the module. Exits with 1 if a bug stayed hidden."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.planted", description=__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=SEEDS_MAX)
    parser.add_argument("names", nargs="*", help="these only")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {bug.name for bug in BUGS}:
        known = ", ".join(bug.name for bug in BUGS)
        parser.error(f"no such bugs: {', '.join(sorted(unknown))}; there are: {known}")
    hidden = 0
    for bug in BUGS:
        if asked.names and bug.name not in asked.names:
            continue
        began = time.monotonic()
        found = hunt(bug, asked.seeds)
        hidden += not found.invariant
        took = time.monotonic() - began
        verdict = found.words if found.invariant else "NOT FOUND"
        print(f"{bug.name:32} {found.seeds:5} seeds {took:6.1f} s  {verdict[:120]}", flush=True)
    return 1 if hidden else 0


if __name__ == "__main__":
    sys.exit(main())
