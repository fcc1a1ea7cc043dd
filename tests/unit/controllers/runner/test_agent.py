"""The agent over fakes, in virtual time: what a node does with and without an orchestrator."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from bacalhau.node.ledger import SqliteLedger
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import TerminalError, TransientError, UnavailableError
from bacalhau_api.v1.execution import Desired, Execution, Phase, PublicationPhase
from bacalhau_api.v1.job import JobType, Resources, RestartPolicy, SpecConfig
from bacalhau_api.wire import Assignments, Changes, Refused
from bacalhau_controllers.runner import machine
from bacalhau_controllers.runner.fakes import MemoryLink
from bacalhau_controllers.runner.ledger import (
    LedgerFullError,
    LedgerHeldError,
    MemoryLedger,
    PutContact,
)
from bacalhau_controllers.runner.ports import Collected, Layout, Observation, RunPhase
from bacalhau_controllers.runner.state import Exited, Limits, Stage, Started
from tests.support.runner import NODE, World, execution, publication, stopped
from tests.support.simclock import SimLoop


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with SimLoop() as loop:
        yield loop


def world(loop: SimLoop, **options: Any) -> World:
    one = World(loop, **options)
    one.start()
    loop.run_until_idle()
    return one


def stored(of: World) -> MemoryLedger:
    assert isinstance(of.ledger, MemoryLedger)
    return of.ledger


# -- the usual way ---------------------------------------------------------------------------------


def test_an_assigned_execution_runs_and_is_reported(loop: SimLoop) -> None:
    w = world(loop)
    applied = w.do(w.hub.assign(execution("a", seconds=3, inputs=("/x", "/y"), results=("r",))))
    assert applied.number == 1
    assert w.hub.report("a").phase is Phase.RUNNING
    workload = w.engine.runs["a.1"].workload
    assert [m.target for m in workload.mounts] == ["/in/0", "/in/1", "/out/r"]
    assert workload.env["BACALHAU_EXECUTION_ID"] == "a"
    assert workload.env["BACALHAU_NODE_ID"] == NODE
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    loop.run_until_idle()
    assert w.hub.reports["uid-a"].outputs is not None
    assert not w.engine.runs  # the engine forgets what was reported for good
    assert not stored(w).stored.facts
    assert not w.live.workers
    assert w.live.snapshot().stages == {"Done": 1}
    assert w.hub.problems == []


def test_a_thousand_at_once_share_their_flushes(loop: SimLoop) -> None:
    big = Resources(cpu_millis=10**7, memory_bytes=1 << 50)
    w = world(loop, policy={"capacity": big, "executions_max": 2000}, starts_max=64)
    names = [f"e{n}" for n in range(1000)]
    w.do(w.hub.assign(*(execution(name, seconds=5) for name in names)))
    reports = w.until_final(*names)
    assert {report.phase for report in reports} == {Phase.SUCCEEDED}
    assert stored(w).commits < 600
    assert all(count == 1 for count in w.engine.started.values())


def test_stop_is_obeyed(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=None)
    w.do(w.hub.assign(one))
    w.do(w.hub.assign(stopped(one)))
    report = w.until_final("a")[0]
    assert (report.phase, report.reason) == (Phase.STOPPED, "UserRequest")
    assert not w.engine.running()


def test_an_execution_that_comes_stopped_never_starts(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(stopped(execution("a"))))
    assert w.until_final("a")[0].phase is Phase.STOPPED
    assert not w.engine.started


def test_gone_is_stopped_and_removed(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=None)
    w.do(w.hub.assign(one))
    w.do(w.hub.drop(one))
    loop.advance(1)
    assert not w.engine.runs
    assert not w.workspace.directories
    assert not stored(w).stored.states


def test_a_namesake_waits_until_the_first_is_removed(loop: SimLoop) -> None:
    w = world(loop)
    old = execution("a", seconds=None, uid="old")
    w.do(w.hub.assign(old))
    w.engine.stops_fail = True
    w.do(w.hub.drop(old))
    w.do(w.hub.assign(execution("a", seconds=None, uid="uid-a")))
    loop.advance(5)
    assert w.engine.started == {"a.1": 1}
    assert "uid-a" not in w.live.workers
    w.engine.stops_fail = False
    loop.advance(30)
    assert set(stored(w).stored.states) == {"uid-a"}
    assert w.engine.started == {"a.1": 2}  # removed in between: another run of the same name
    assert w.engine.running() == ("a.1",)


def test_the_same_with_a_ledger_on_disk(loop: SimLoop, tmp_path: Path) -> None:
    ledger = SqliteLedger(tmp_path / "ledger.db", SystemClock(), SystemIds())
    w = world(loop, ledger=ledger)
    restart = RestartPolicy(backoff_seconds=1)
    service = execution("s", job_type=JobType.SERVICE, seconds=None, restart=restart)
    one = execution("a", seconds=20)
    w.do(w.hub.assign(one, service, execution("b", seconds=1)))
    w.until_final("b")
    w.kill()
    w.start(is_up=False)
    loop.advance(30)
    w.reboot()
    w.start()
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    w.do(w.hub.assign(publication(one)))
    loop.advance(30)
    assert w.hub.publication_reports["pub-a"].phase is PublicationPhase.DELIVERED
    assert w.engine.started == {"a.1": 1, "b.1": 1, "s.1": 1, "s.2": 1}
    w.do(w.hub.drop(one))
    loop.advance(1)
    w.kill()
    book = w.do(ledger.open())
    w.do(ledger.close())
    assert set(book.states) == {"uid-b", "uid-s"}
    assert not book.facts
    assert w.hub.problems + w.workspace.problems == []


# -- admission and capacity ------------------------------------------------------------------------


def test_refusals_are_facts(loop: SimLoop) -> None:
    w = world(loop)
    w.storage.refusals["/secret"] = "this path is not allowed"
    w.do(w.hub.assign(execution("a", engine="docker"), execution("b", inputs=("/secret",))))
    first, second = w.until_final("a", "b")
    assert (first.phase, first.reason) == (Phase.REJECTED, "EngineMissing")
    assert (second.phase, second.reason) == (Phase.REJECTED, "SourceRefused")
    assert "not allowed" in second.message


def test_capacity_is_never_over_committed(loop: SimLoop) -> None:
    w = world(loop)
    asked = Resources(cpu_millis=1500, memory_bytes=1)
    names = [f"e{n}" for n in range(6)]
    w.do(w.hub.assign(*(execution(name, seconds=10, resources=asked) for name in names)))
    loop.advance(0.1)
    assert len(w.engine.running()) == 2
    assert w.live.snapshot().waiting_for_capacity == 4
    waiting = w.hub.report("e5").waiting
    assert waiting is not None
    assert waiting.what == "Capacity"
    while any(w.hub.reports[f"uid-{n}"].phase.is_final is False for n in names):
        assert len(w.engine.running()) <= 2
        assert w.live.site.allocator.allocated.cpu_millis <= 4000
        loop.advance(1)
    too_big = Resources(cpu_millis=5000)
    w.do(w.hub.assign(execution("big", resources=too_big)))
    report = w.until_final("big")[0]
    assert (report.phase, report.reason) == (Phase.REJECTED, "Capacity")


def test_capacity_is_held_again_after_a_restart(loop: SimLoop) -> None:
    w = world(loop)
    asked = Resources(cpu_millis=3000, memory_bytes=1)
    w.do(w.hub.assign(execution("a", seconds=60, resources=asked)))
    w.kill()
    w.hub.keep(execution("b", seconds=1, resources=asked))
    w.start()
    loop.advance(30)
    assert w.engine.running() == ("a.1",)
    assert w.until_final("b", seconds_max=60)[0].phase is Phase.SUCCEEDED


# -- inputs ----------------------------------------------------------------------------------------


def test_transient_fetch_errors_are_tried_again(loop: SimLoop) -> None:
    w = world(loop)
    w.storage.errors = [UnavailableError("no answer"), TransientError("reset")]
    w.do(w.hub.assign(execution("a", inputs=("/x",))))
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED


def test_terminal_fetch_errors_fail_at_once(loop: SimLoop) -> None:
    w = world(loop)
    w.storage.errors = [TerminalError("no such object")]
    w.do(w.hub.assign(execution("a", inputs=("/x",))))
    report = w.until_final("a")[0]
    assert (report.phase, report.reason) == (Phase.FAILED, "InputFailed")
    assert not w.engine.started


# -- without an orchestrator -----------------------------------------------------------------------


def test_work_goes_on_while_cut_off_and_is_told_later(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=100)))
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(500)
    assert w.hub.report("a").phase is Phase.RUNNING
    w.hub.link.set_up(True)
    assert w.until_final("a", seconds_max=1)[0].phase is Phase.SUCCEEDED


def test_agent_starts_and_restarts_services_offline(loop: SimLoop) -> None:
    w = world(loop)
    restart = RestartPolicy(backoff_seconds=1)
    service = execution("s", job_type=JobType.SERVICE, seconds=None, restart=restart)
    w.do(w.hub.assign(service, execution("b", seconds=None)))
    w.reboot()
    w.start(is_up=False)
    loop.advance(10)
    assert set(w.engine.running()) == {"s.2", "b.2"}
    w.engine.end("s.2", 1)
    loop.advance(10)
    assert "s.3" in w.engine.running()
    assert w.hub.link is not None
    w.hub.link.set_up(True)
    loop.advance(1)
    assert w.hub.report("s").run == 3
    assert w.hub.problems == []


def test_what_runs_is_adopted_not_run_again(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=100), execution("b", seconds=5)))
    w.kill()
    loop.advance(50)  # b ends while nobody looks
    w.start()
    loop.advance(1)
    assert w.hub.report("b").phase is Phase.SUCCEEDED
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    assert w.engine.started == {"a.1": 1, "b.1": 1}


def test_an_orderly_shutdown_ends_runs_that_go_on_at_the_next_start(loop: SimLoop) -> None:
    w = world(loop)
    restart = RestartPolicy(backoff_seconds=1)
    service = execution("s", job_type=JobType.SERVICE, seconds=None, restart=restart)
    w.do(w.hub.assign(service, execution("b", seconds=20)))
    agent = w.live
    w.task.cancel()
    loop.run_until_idle()
    w.do(agent.close(keep_running=False))
    assert not w.engine.running()
    w.start()
    loop.advance(5)
    assert set(w.engine.running()) == {"s.2", "b.2"}
    assert w.until_final("b")[0].phase is Phase.SUCCEEDED
    assert w.hub.problems + w.workspace.problems == []


def test_workloads_outlive_an_agent_that_is_told_so(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("b", seconds=20)))
    agent = w.live
    w.task.cancel()
    loop.run_until_idle()
    w.do(agent.close(keep_running=True))
    assert w.engine.running() == ("b.1",)
    w.start()
    assert w.until_final("b")[0].phase is Phase.SUCCEEDED
    assert w.engine.started == {"b.1": 1}


def test_a_run_that_was_taken_for_ended_is_ended_before_the_next(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("b", seconds=None)))
    ended = w.engine.runs["b.1"]
    w.engine.vanish("b.1")  # so the engine says, and is wrong
    ended.ended = None
    worker = w.live.workers["uid-b"]
    worker.post(Exited(1, Observation(RunPhase.VANISHED)))
    loop.advance(10)
    assert w.engine.running() == ("b.2",)


def test_a_full_disk_that_nobody_writes_to_is_found_to_have_room(loop: SimLoop) -> None:
    w = world(loop)
    loop.advance(20)
    stored(w).is_full = True
    task = loop.create_task(w.live.site.writer.commit([PutContact(w.live.now())]))
    loop.run_until_idle()
    assert isinstance(task.exception(), LedgerFullError)
    assert not w.live.info().engines[0].available
    stored(w).is_full = False
    loop.advance(11)
    assert w.live.site.writer.full is None
    assert not w.live.info().engines[0].available  # small commits may succeed on a full disk, too
    loop.advance(30)
    assert w.live.info().engines[0].available


def test_runs_that_nobody_knows_are_removed(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None), execution("b", seconds=None)))
    w.kill()
    w.ledger = MemoryLedger("ledger-2")  # wiped
    w.start(is_up=False)
    loop.advance(1)
    assert not w.engine.runs


def test_what_an_earlier_ledger_began_is_not_begun_again(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None), execution("b", seconds=1)))
    w.until_final("b")
    w.kill()
    w.ledger = MemoryLedger("ledger-2")
    w.start()
    report = w.until_final("a")[0]
    assert (report.phase, report.reason) == (Phase.FAILED, "LedgerLost")
    assert report.is_system_fault
    assert report.incarnation == "ledger-2"
    assert w.hub.report("b").phase is Phase.SUCCEEDED
    loop.advance(100)
    assert w.engine.started == {"a.1": 1, "b.1": 1}


def test_an_old_copy_of_the_ledger_is_noticed(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=None)
    w.do(w.hub.assign(one))
    old = stored(w).stored
    w.hub.reports["uid-a"] = w.hub.report("a").but(step=99)
    w.kill()
    w.ledger = MemoryLedger("ledger-1")
    w.ledger._book = old
    w.start()
    report = w.until_final("a")[0]
    assert report.reason == "LedgerLost"
    assert not w.engine.running()


def test_a_run_beyond_an_old_copy_of_the_ledger_is_swept(loop: SimLoop) -> None:
    """While the node is cut off, nobody tells it that its ledger is an old copy."""
    w = world(loop)
    again = RestartPolicy(backoff_seconds=1)
    w.do(w.hub.assign(execution("a", job_type=JobType.SERVICE, seconds=None, restart=again)))
    old = stored(w).stored
    for run in (1, 2):
        w.until(lambda run=run: w.engine.running() == (f"a.{run}",))  # type: ignore[misc]
        w.engine.end(f"a.{run}")
    w.until(lambda: w.engine.running() == ("a.3",))
    w.kill()
    w.ledger = MemoryLedger("ledger-1")
    w.ledger._book = old
    assert w.hub.link is not None
    w.start()
    w.hub.link.set_up(False)
    loop.advance(100)
    assert w.engine.running() == ("a.2",)


# -- the disconnect policy `stop` ------------------------------------------------------------------


def test_policy_stop_begins_nothing_beside_what_an_unknown_past_left(loop: SimLoop) -> None:
    """The ledger is an older copy than anybody noticed, and the engine cannot stop just now."""
    w = world(loop)
    again = RestartPolicy(backoff_seconds=1)
    strict = execution(
        "a", job_type=JobType.SERVICE, seconds=None, local_deadline=600, restart=again
    )
    w.do(w.hub.assign(strict))
    w.engine.end("a.1")
    loop.advance(20)
    assert w.engine.running() == ("a.2",)
    w.kill()
    w.ledger = MemoryLedger("ledger-1")
    w.hub.reports.clear()
    w.engine.stops_fail = True
    w.start()
    loop.advance(20)
    assert w.engine.running() == ("a.2",)
    assert w.engine.started == {"a.1": 1, "a.2": 1}
    w.engine.stops_fail = False
    loop.advance(60)
    assert w.engine.running() != ("a.2",)
    assert len(w.engine.running()) <= 1


def test_policy_stop_stops_by_the_nodes_own_clock(loop: SimLoop) -> None:
    w = world(loop)
    w.do(
        w.hub.assign(execution("a", seconds=None, local_deadline=60), execution("b", seconds=None))
    )
    loop.advance(300)
    assert len(w.engine.running()) == 2  # linked: nothing to stop
    assert w.hub.link is not None
    heard = loop.time() - 5  # the last beat was not earlier
    w.hub.link.set_up(False)
    w.clock.set_forward(-86400)
    w.until(lambda: w.engine.running() == ("b.1",), seconds_max=70)
    assert 55 <= loop.time() - heard <= 66
    w.hub.link.set_up(True)
    report = w.until_final("a")[0]
    assert (report.phase, report.reason) == (Phase.STOPPED, "Disconnected")


def test_work_gets_a_leash_that_grows_with_each_contact(loop: SimLoop) -> None:
    """So that it ends by itself should the agent be dead when the time has come."""
    w = world(loop)
    w.do(
        w.hub.assign(execution("a", seconds=None, local_deadline=60), execution("b", seconds=None))
    )
    w.until(lambda: len(w.engine.running()) == 2)
    leash = w.engine.runs["a.1"].workload.leash
    assert leash is not None
    assert leash.noted == w.workspace.contact_file
    assert 60 < leash.seconds < 65, "a little more than the agent's own time"
    assert w.clock.monotonic() - 10 < leash.contact <= w.clock.monotonic()
    assert w.engine.runs["b.1"].workload.leash is None
    loop.advance(200)
    noted = w.workspace.contact
    assert noted is not None
    assert noted[0] == leash.boot
    assert w.clock.monotonic() - 10 < noted[1] <= w.clock.monotonic()
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(30)
    noted = w.workspace.contact
    assert noted is not None
    assert noted[1] < w.clock.monotonic() - 29


def test_a_link_that_is_up_but_deaf_is_no_contact(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=60)))
    w.hub.is_deaf = True
    w.until(lambda: not w.engine.running(), seconds_max=66)


def test_a_refusal_is_no_contact(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=60)))
    w.hub.refuse = Refused(node="", session="", reason="UnknownNode", message="who?")
    w.until(lambda: not w.engine.running(), seconds_max=66)


def test_policy_stop_survives_a_restart_of_the_agent(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=60)))
    w.kill()
    loop.advance(40)
    w.start(is_up=False)
    loop.advance(15)
    assert w.engine.running()
    loop.advance(10)
    assert not w.engine.running()
    w.kill()


def test_policy_stop_is_late_for_nobody_when_the_agent_was_dead(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=60)))
    w.kill()
    loop.advance(100)
    w.start(is_up=False)
    loop.run_until_idle()
    assert not w.engine.running()


def test_policy_stop_restarts_nothing_unheard_after_a_reboot(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=600)))
    w.reboot()
    w.start(is_up=False)
    loop.advance(100)
    assert not w.engine.running()
    assert w.hub.link is not None
    w.hub.link.set_up(True)
    loop.advance(1)
    assert w.engine.running() == ("a.2",)


# -- engines that fail -----------------------------------------------------------------------------


def test_a_start_that_hangs_marks_the_engine_and_fails_the_execution(loop: SimLoop) -> None:
    w = world(loop)
    w.engine.starts_hang = True
    w.do(w.hub.assign(execution("a")))
    loop.advance(70)
    engine = w.live.info().engines[0]
    assert not engine.available
    assert engine.reason.startswith("EngineFault")
    told = w.hub.beats[-1].info or w.hub.hellos[-1].info
    assert any(b.info and not b.info.engines[0].available for b in w.hub.beats), told
    report = w.until_final("a", seconds_max=900)[0]
    assert (report.phase, report.reason) == (Phase.FAILED, "EngineFault")
    assert report.is_system_fault
    w.engine.starts_hang = False
    w.until(lambda: w.live.info().engines[0].available, seconds_max=1000)
    w.do(w.hub.assign(execution("b")))
    assert w.until_final("b")[0].phase is Phase.SUCCEEDED


def test_a_start_that_hung_and_yet_worked_is_adopted(loop: SimLoop) -> None:
    w = world(loop, limits=Limits(start_try_seconds=5))
    w.engine._start_seconds = 4.0
    w.do(w.hub.assign(execution("a", seconds=20)))
    w.kill()  # in the middle of the start
    w.start()
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    assert w.engine.started == {"a.1": 1}


def test_an_engine_that_is_down_refuses_nothing_for_good(loop: SimLoop) -> None:
    w = World(loop)
    w.engine.is_silent = True
    w.start()
    loop.advance(120)
    assert not w.live.info().engines[0].available
    w.do(w.hub.assign(execution("a")))
    report = w.until_final("a")[0]
    assert (report.phase, report.is_system_fault) == (Phase.FAILED, True)
    w.engine.is_silent = False
    loop.advance(60)
    w.do(w.hub.assign(execution("b")))
    assert w.until_final("b")[0].phase is Phase.SUCCEEDED


@pytest.mark.parametrize("is_restarted", [True, False])
def test_an_engine_that_fails_in_an_unforeseen_way_costs_no_agent(
    loop: SimLoop, *, is_restarted: bool
) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=1000)))
    loop.advance(10)
    w.engine.answer_error = OSError(24, "Too many open files")
    if is_restarted:
        w.kill()
        w.start()
    loop.advance(900)
    w.engine.answer_error = None
    assert w.until_final("a", seconds_max=2000)[0].phase is Phase.SUCCEEDED
    assert w.engine.started == {"a.1": 1}


def test_a_silent_engine_is_waited_for(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=1000)))
    w.engine.is_silent = True
    w.kill()
    w.start()
    loop.advance(200)
    assert w.hub.report("a").waiting is not None
    w.engine.is_silent = False
    assert w.until_final("a", seconds_max=2000)[0].phase is Phase.SUCCEEDED
    assert w.engine.started == {"a.1": 1}


def test_outputs_that_take_hours_to_read_are_no_failure(loop: SimLoop) -> None:
    w = world(loop)
    real = w.workspace.collect

    async def collect(layout: Layout, exit_code: int | None) -> Collected:
        await asyncio.sleep(2 * 3600)  # a terabyte, on a slow disk
        return await real(layout, exit_code)

    w.workspace.collect = collect  # type: ignore[method-assign]
    w.do(w.hub.assign(execution("a")))
    loop.advance(3600)
    waiting = w.hub.report("a").waiting
    assert waiting is not None
    assert waiting.until is not None
    assert (waiting.what, waiting.until > w.clock.now()) == ("Outputs", True)
    assert w.until_final("a", seconds_max=8000)[0].phase is Phase.SUCCEEDED


def test_a_start_waits_for_an_engine_that_is_away_for_a_while(loop: SimLoop) -> None:
    """As after a boot, or while it is upgraded. Nobody else need be there to begin it anew."""
    w = world(loop)
    restart = RestartPolicy(backoff_seconds=5)
    service = execution("s", job_type=JobType.SERVICE, seconds=None, restart=restart)
    w.do(w.hub.assign(service))
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    w.engine.end("s.1", 1)
    loop.advance(1)
    w.engine.answer_error = UnavailableError("nobody listens")
    loop.advance(90)
    w.engine.answer_error = None
    loop.advance(90)
    assert w.engine.running() == ("s.2",)
    assert w.engine.started == {"s.1": 1, "s.2": 1}


def test_stop_is_repeated_until_the_engine_obeys(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=None)
    w.do(w.hub.assign(one))
    w.engine.stops_fail = True
    w.do(w.hub.assign(stopped(one)))
    report = w.until_final("a")[0]
    assert "did not confirm" in report.message
    assert w.engine.running() == ("a.1",)
    w.engine.stops_fail = False
    loop.advance(61)  # the sweep
    assert not w.engine.runs


def test_bugs_in_plugs_are_faults_of_the_node_and_hit_nobody_else(
    loop: SimLoop, caplog: pytest.LogCaptureFixture
) -> None:
    w = world(loop)

    async def admit(source: SpecConfig) -> str:
        if source.params["path"] == "/bug":
            raise ValueError("a bug")
        return ""

    w.storage.admit = admit  # type: ignore[method-assign]
    w.do(w.hub.assign(execution("a", inputs=("/bug",)), execution("b", inputs=("/fine",))))
    first, second = w.until_final("a", "b")
    assert (first.phase, first.reason) == (Phase.FAILED, "AdmissionFault")
    assert first.is_system_fault
    assert second.phase is Phase.SUCCEEDED
    assert "Failed in an unforeseen way" in caplog.text


def test_work_that_a_plug_broke_off_is_begun_again(loop: SimLoop) -> None:
    """As a pull that several wait for, when the engine is opened anew."""
    w = World(loop)
    real: dict[str, Callable[..., Awaitable[Any]]] = {
        "prepare": w.engine.prepare,
        "health": w.engine.health,
    }
    times = {"prepare": 2, "health": 2}

    def breaking_off(name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any) -> Any:
            if times[name]:
                times[name] -= 1
                shared = asyncio.ensure_future(asyncio.sleep(3600))
                asyncio.get_running_loop().call_later(1.0, shared.cancel)
                await asyncio.shield(shared)
            return await real[name](*arguments)

        return call

    for name in real:
        setattr(w.engine, name, breaking_off(name))
    w.start()
    loop.advance(60)
    w.do(w.hub.assign(execution("a")))
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    assert times == {"prepare": 0, "health": 0}


def test_a_bug_of_ours_hits_one_execution_and_not_for_ever(
    loop: SimLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    w = world(loop)
    real, times = machine.step, [2]

    def step(of: Any, state: Any, event: Any, *others: Any) -> machine.Step:
        if of.name == "a" and isinstance(event, Started) and times[0]:
            times[0] -= 1
            raise ValueError("a bug")
        return real(of, state, event, *others)

    monkeypatch.setattr(machine, "step", step)
    w.do(w.hub.assign(execution("a", seconds=1), execution("b")))
    assert w.until_final("b", seconds_max=5)[0].phase is Phase.SUCCEEDED
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    assert w.engine.started["a.1"] == 1
    assert "Failed to move an execution" in caplog.text


def test_bad_params_are_the_jobs_own_fault(loop: SimLoop) -> None:
    w = world(loop)
    w.engine.start_error = TerminalError("not a module", reason="CompileFailed")
    w.do(w.hub.assign(execution("a")))
    report = w.until_final("a")[0]
    assert (report.phase, report.reason) == (Phase.FAILED, "CompileFailed")
    assert not report.is_system_fault


# -- the ledger is full ----------------------------------------------------------------------------


def test_a_full_disk_refuses_new_work_and_keeps_the_old(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=20), execution("s", seconds=None)))
    stored(w).is_full = True
    assert w.do(w.hub.assign(execution("b"))) is None
    loop.advance(60)
    assert w.hub.beats[-1].session == w.hub.session  # it is alive, and says what is wrong
    assert any(b.info and "LedgerFull" in b.info.engines[0].reason for b in w.hub.beats) or (
        "LedgerFull" in w.hub.hellos[-1].info.engines[0].reason
    )
    assert w.engine.running() == ("s.1",)
    assert not w.hub.report("a").phase.is_final  # not told before it is stored
    stored(w).is_full = False
    reports = w.until_final("a", "b", seconds_max=120)
    assert {one.phase for one in reports} == {Phase.SUCCEEDED}
    w.until(lambda: w.live.info().engines[0].available, seconds_max=60)


def test_a_full_disk_does_not_hold_up_the_policy_stop(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None, local_deadline=60)))
    stored(w).is_full = True
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(66)
    assert not w.engine.running()


# -- the session -----------------------------------------------------------------------------------


def test_lost_acks_and_doubled_facts_change_nothing(loop: SimLoop) -> None:
    w = world(loop)
    w.hub.lose_acks = 3
    w.do(w.hub.assign(execution("a")))
    w.until_final("a")
    loop.advance(20)
    assert len(w.hub.facts) > len({fact.seq for fact in w.hub.facts})
    assert not stored(w).stored.facts
    assert w.hub.problems == []


def test_the_outbox_is_no_longer_than_the_number_of_objects(loop: SimLoop) -> None:
    w = world(loop)
    restart = RestartPolicy(backoff_seconds=1, backoff_seconds_max=1)
    w.do(w.hub.assign(execution("s", job_type=JobType.SERVICE, seconds=1, restart=restart)))
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(600)
    assert len(stored(w).stored.facts) == 1
    assert w.engine.started.keys() >= {"s.100"}
    w.hub.link.set_up(True)
    loop.advance(0.5)
    assert w.hub.report("s").run > 100


def test_what_is_stored_is_not_sent_again(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a")))
    w.hub.lose_acks = 1000
    w.until_final("a")
    count = len(w.hub.facts)
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    w.hub.lose_acks = 0
    loop.run_until_idle()
    count = len(w.hub.facts)
    w.hub.link.set_up(True)
    loop.advance(10)
    assert len(w.hub.facts) == count
    assert not stored(w).stored.facts


def test_messages_of_another_session_are_dropped(loop: SimLoop) -> None:
    w = world(loop)
    assert w.hub.link is not None
    for node, session in ((NODE, "stolen"), ("n2", w.hub.session), (NODE, "")):
        forged = Changes(
            node=node,
            session=session,
            number=1,
            assignments=Assignments(executions=(execution("evil"),)),
        )
        assert w.do(w.hub.link.push(forged)) is None
    loop.advance(10)
    assert not w.engine.started
    assert w.live.is_session(NODE, w.hub.session)
    assert not w.live.is_session(NODE, "stolen")
    assert not w.live.is_session("n2", w.hub.session)


def test_a_gap_in_the_changes_brings_a_new_hello(loop: SimLoop) -> None:
    w = world(loop)
    w.hub.keep(execution("lost"))
    w.hub.number += 1  # a push that never came
    assert w.do(w.hub.assign(execution("a"))) is None
    assert {r.phase for r in w.until_final("a", "lost")} == {Phase.SUCCEEDED}
    assert len(w.hub.hellos) == 2
    loop.advance(10)


def test_changes_of_a_session_that_ended_do_not_count_in_the_next(loop: SimLoop) -> None:
    """A disk that takes a second to flush, and a line that breaks meanwhile."""
    pace = 0.0

    async def slow(point: str) -> None:
        if point == "ledger.commit":
            await asyncio.sleep(pace)

    w = world(loop, boundary=slow)
    loop.advance(1)
    pace = 2.0
    first = loop.create_task(w.hub.assign(execution("a")))
    loop.advance(0.5)
    link_of(w).set_up(False)
    link_of(w).set_up(True)
    loop.advance(4)
    pace = 0.0
    assert first.result() is None
    assert w.do(w.hub.assign(execution("b"))).number == 1
    w.until_final("a", "b")


def test_changes_that_come_twice_are_applied_once(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None)))
    w.hub.number -= 1
    assert w.do(w.hub.assign(execution("a", seconds=None))).number == 1
    assert len(w.hub.hellos) == 1
    assert w.engine.started == {"a.1": 1}


def test_an_older_list_never_overrides_a_newer(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a", seconds=None, version=5)
    w.do(w.hub.assign(stopped(one, version=6)))
    w.until_final("a")
    two = execution("b", seconds=None, version=9)
    w.do(w.hub.assign(two))
    w.do(w.hub.assign(stopped(two, version=8)))  # delayed from before
    loop.advance(30)
    assert w.engine.running() == ("b.1",)


def test_a_long_list_comes_in_parts(loop: SimLoop) -> None:
    w = World(loop)
    w.hub.part_size = 3
    names = [f"e{n}" for n in range(10)]
    w.hub.keep(*(execution(name) for name in names))
    w.start()
    assert {r.phase for r in w.until_final(*names)} == {Phase.SUCCEEDED}


def test_parts_of_two_lists_are_not_put_together(loop: SimLoop) -> None:
    w = World(loop)
    w.hub.part_size = 3
    w.hub.relists = 1
    names = [f"e{n}" for n in range(5)]
    w.hub.keep(*(execution(name) for name in names))
    w.start()
    assert {r.phase for r in w.until_final(*names)} == {Phase.SUCCEEDED}
    assert len(w.hub.hellos) == 2
    loop.advance(10)
    assert {beat.list_id for beat in w.hub.beats} == {str(w.hub.list_id)}


def test_what_a_rejected_node_is_told_is_obeyed(loop: SimLoop) -> None:
    """The gateway tells it by the version that there is: nothing has been written yet."""
    w = world(loop)
    one = execution("a", seconds=None)
    w.do(w.hub.assign(one))
    loop.advance(5)
    assert w.engine.running() == ("a.1",)
    w.do(w.hub.assign(stopped(one, "NodeRejected", version=one.metadata.resource_version)))
    loop.advance(15)
    assert w.engine.running() == ()
    assert w.hub.report("a").reason == "NodeRejected"


def test_what_the_full_list_lacks_is_stopped(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=None), execution("b", seconds=None)))
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    w.hub.executions.pop("uid-a")
    loop.advance(10)
    w.hub.link.set_up(True)
    loop.advance(10)
    assert w.engine.running() == ("b.1",)
    assert set(stored(w).stored.states) == {"uid-b"}


def test_what_a_restored_store_lacks_is_told_again(loop: SimLoop) -> None:
    """It was acknowledged, and is not stored any more."""
    w = world(loop)
    ended = execution("a", seconds=5)
    w.do(w.hub.assign(ended, execution("b", seconds=None)))
    loop.advance(10)
    w.do(w.hub.assign(publication(ended)))
    loop.advance(10)
    before, delivered = dict(w.hub.reports), dict(w.hub.publication_reports)
    assert {report.phase for report in before.values()} == {Phase.SUCCEEDED, Phase.RUNNING}
    assert not stored(w).stored.facts
    w.hub.reports.clear()
    w.hub.publication_reports.clear()
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(1)
    w.hub.link.set_up(True)
    loop.advance(10)
    assert {u: r.phase for u, r in w.hub.reports.items()} == {u: r.phase for u, r in before.items()}
    assert w.hub.report("a") == before["uid-a"]
    again = w.hub.publication_reports
    assert {u: r.phase for u, r in again.items()} == {u: r.phase for u, r in delivered.items()}
    count = len(w.hub.facts)
    w.hub.link.set_up(False)
    loop.advance(1)
    w.hub.link.set_up(True)
    loop.advance(10)
    assert len(w.hub.facts) == count, "what is stored is not told again"


def test_a_finished_result_that_nobody_lists_is_told_before_it_goes(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=5)))
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.advance(10)
    w.hub.executions.pop("uid-a")
    w.hub.lose_acks = 1
    w.hub.link.set_up(True)
    loop.run_until_idle()
    assert "uid-a" in stored(w).stored.states
    loop.advance(5)
    assert w.hub.facts[-1].execution is not None
    assert w.hub.facts[-1].execution.phase is Phase.SUCCEEDED
    assert not stored(w).stored.states
    assert not w.workspace.directories


def test_a_refused_node_asks_again(loop: SimLoop) -> None:
    w = World(loop)
    w.hub.refuse = Refused(
        node="", session="", reason="UnknownNode", message="join first", again_seconds=15
    )
    w.start()
    loop.advance(60)
    assert "join first" in w.live.snapshot().session_message
    assert not w.live.snapshot().is_welcome
    w.hub.refuse = None
    w.until(lambda: w.live.snapshot().is_welcome, seconds_max=30)


def test_a_node_that_is_not_approved_waits_and_says_so(loop: SimLoop) -> None:
    w = World(loop)
    w.hub.is_approved = False
    w.start()
    loop.advance(3)
    snapshot = w.live.snapshot()
    assert not snapshot.is_approved
    assert "approval" in snapshot.session_message
    w.hub.is_approved = True
    w.until(lambda: w.live.snapshot().is_approved, seconds_max=60)


def test_beats_tell_what_changed(loop: SimLoop) -> None:
    w = world(loop)
    loop.advance(30)
    assert len(w.hub.beats) == 6
    assert all(beat.info is None for beat in w.hub.beats)
    w.engine.health_now = type(w.engine.health_now)(is_available=False, reason="daemon is down")
    loop.advance(20)
    told = [beat.info for beat in w.hub.beats if beat.info is not None]
    assert len(told) == 1
    assert told[0].engines[0].reason == "daemon is down"


# -- publications ----------------------------------------------------------------------------------


def test_outputs_are_published_once_and_told(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a")
    w.do(w.hub.assign(one))
    w.until_final("a")
    w.publisher.errors = [UnavailableError("no route"), TransientError("reset")]
    w.do(w.hub.assign(publication(one)))
    told = w.hub.publication_reports

    def is_final() -> bool:
        return "pub-a" in told and told["pub-a"].phase.is_final

    assert w.until(is_final) > 1
    report = told["pub-a"]
    assert report.phase is PublicationPhase.DELIVERED
    assert report.attempts == 3
    assert report.location is not None
    assert report.size_bytes > 0
    w.kill()
    w.start()
    loop.advance(100)
    assert w.publisher.delivered == {"pub-a": 1}


def test_a_publication_can_be_stopped_and_withdrawn(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a")
    w.do(w.hub.assign(one))
    w.until_final("a")
    w.publisher.errors = [UnavailableError("no route")] * 100
    wanted = publication(one)
    w.do(w.hub.assign(wanted))
    w.do(w.hub.assign(stopped_publication(wanted)))
    w.until(lambda: w.hub.publication_reports["pub-a"].phase.is_final)
    report = w.hub.publication_reports["pub-a"]
    assert (report.phase, report.reason) == (PublicationPhase.FAILED, "Stopped")
    w.do(w.hub.drop(wanted))
    loop.advance(1)
    assert not stored(w).stored.publications
    assert not stored(w).stored.publication_states


def stopped_publication(of: Any) -> Any:
    return of.with_meta(resource_version=2).but(spec=of.spec.but(desired=Desired.STOP))


def test_publishing_goes_on_after_a_restart(loop: SimLoop) -> None:
    w = world(loop)
    one = execution("a")
    w.do(w.hub.assign(one))
    w.until_final("a")
    w.publisher.errors = [UnavailableError("no route")] * 3
    w.do(w.hub.assign(publication(one)))
    loop.advance(1)
    w.reboot()
    w.start(is_up=False)
    loop.advance(120)
    assert w.publisher.delivered == {"pub-a": 1}


def test_outputs_that_are_gone_cannot_be_published(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(publication(execution("never"))))
    w.until(lambda: w.hub.publication_reports["pub-never"].phase.is_final)
    assert w.hub.publication_reports["pub-never"].reason == "OutputsGone"


# -- retention and upkeep --------------------------------------------------------------------------


def test_outputs_are_kept_until_old_told_and_published(loop: SimLoop) -> None:
    w = world(loop, retention_seconds=3600)
    one, two = execution("a"), execution("b")
    w.do(w.hub.assign(one, two))
    w.until_final("a", "b")
    w.publisher.errors = [UnavailableError("no route")] * 10_000
    w.do(w.hub.assign(publication(two)))
    w.clock.set_forward(366 * 86400)  # the wall clock is not believed
    loop.advance(3000)
    assert all(one.has_outputs for one in w.workspace.directories.values())
    loop.advance(1200)
    kept = {key[1]: one.has_outputs for key, one in w.workspace.directories.items()}
    assert kept == {"a": False, "b": True}
    assert not w.live.keeps_outputs("default", "a")
    assert w.live.keeps_outputs("default", "b")
    assert w.live.state_of("uid-a") is not None  # it is not run again


def test_outputs_beyond_the_size_go_oldest_first(loop: SimLoop) -> None:
    w = world(loop, retention_bytes=12)
    for name in ("a", "b", "c"):
        w.do(w.hub.assign(execution(name)))
        w.until_final(name)
    loop.advance(301)
    kept = {key[1]: one.has_outputs for key, one in w.workspace.directories.items()}
    assert kept == {"a": False, "b": True, "c": True}


def link_of(w: World) -> MemoryLink:
    assert w.hub.link is not None
    return w.hub.link


def test_outputs_wait_for_an_orchestrator_that_is_gone_before_it_claims_them(
    loop: SimLoop,
) -> None:
    w = world(loop, retention_bytes=1, retention_seconds=3600)
    one, unclaimed = (execution(n, publisher=SpecConfig(type="fake")) for n in "ab")
    w.do(w.hub.assign(one))
    w.until_final("a")
    link_of(w).set_up(False)
    loop.advance(10_000)
    assert w.live.keeps_outputs("default", "a")
    w.hub.keep(publication(one))
    link_of(w).set_up(True)
    w.until(lambda: w.publisher.delivered == {"pub-a": 1})
    w.do(w.hub.assign(unclaimed))
    w.until_final("b")
    loop.advance(301)
    assert not w.live.keeps_outputs("default", "b"), "it was heard, and did not ask for them"


def test_outputs_claimed_while_others_are_removed_stay(loop: SimLoop) -> None:
    w = world(loop, retention_bytes=1)
    one, two = execution("a"), execution("b")
    w.do(w.hub.assign(one, two))
    w.until_final("a", "b")
    w.publisher.errors = [UnavailableError("no route")] * 3
    remove = w.workspace.drop_outputs

    async def removed_slowly(layout: Layout) -> None:
        w.hub.keep(publication(two))
        await w.hub.assign(publication(two))
        await remove(layout)

    w.workspace.drop_outputs = removed_slowly  # type: ignore[method-assign]
    loop.advance(400)
    assert w.publisher.delivered == {"pub-b": 1}


def test_outputs_that_a_publication_gave_up_stay(loop: SimLoop) -> None:
    w = world(loop, retention_seconds=3600, publish_seconds_max=3600.0)
    one = execution("a", publisher=SpecConfig(type="fake"))
    w.do(w.hub.assign(one))
    w.until_final("a")
    w.publisher.errors = [UnavailableError("no route")] * 10_000
    wanted = publication(one)
    w.do(w.hub.assign(wanted))
    loop.advance(20_000)
    assert w.hub.publication_reports["pub-a"].phase is PublicationPhase.FAILED
    assert w.live.keeps_outputs("default", "a")
    w.do(w.hub.assign(stopped_publication(wanted)))
    loop.advance(301)
    assert not w.live.keeps_outputs("default", "a"), "nobody wants them"


def test_directories_that_nobody_knows_go_when_old(loop: SimLoop) -> None:
    w = world(loop, retention_seconds=1000)
    w.do(w.hub.assign(execution("a", seconds=None)))
    w.workspace.directories[("default", "stray")] = type(
        next(iter(w.workspace.directories.values()))
    )()
    w.workspace.stray_seconds = {("default", "stray"): 999, ("default", "a"): 5000}
    loop.advance(301)
    assert ("default", "stray") in w.workspace.directories
    w.workspace.stray_seconds[("default", "stray")] = 1001
    loop.advance(301)
    assert set(w.workspace.directories) == {("default", "a")}


def test_two_agents_cannot_share_a_ledger(loop: SimLoop) -> None:
    w = world(loop)
    other = World(loop, ledger=w.ledger)
    other.start()
    with pytest.raises(LedgerHeldError):
        loop.run_until_complete(other.task)
    w.do(w.hub.assign(execution("a")))
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED


def test_reading_knows_what_is_over(loop: SimLoop) -> None:
    w = world(loop)
    w.do(w.hub.assign(execution("a", seconds=5)))
    assert w.live.is_over("default", "a") is False
    assert w.live.is_over("default", "b") is None
    w.until_final("a")
    assert w.live.is_over("default", "a") is True
    assert w.live.state_of("uid-a").stage is Stage.DONE  # type: ignore[union-attr]


# -- the operator's own say ------------------------------------------------------------------------


class Asked:
    """A probe that says what it is told to; None stands for no clear answer."""

    name = "the gatekeeper"

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def ask(self, execution: Execution) -> str:
        self.asked.append(execution.name)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise UnavailableError("the gatekeeper sleeps")
        return answer


def test_a_probe_that_says_no_rejects_with_its_reason(loop: SimLoop) -> None:
    first, second = Asked(""), Asked("only on Sundays")
    w = world(loop, probes=(first, second))
    w.do(w.hub.assign(execution("a")))
    (report,) = w.until_final("a")
    assert (report.phase, report.reason) == (Phase.REJECTED, "ProbeRefused")
    assert report.message == "the gatekeeper refuses it: only on Sundays"
    assert first.asked == second.asked == ["a"]
    assert w.engine.runs == {}


def test_what_the_nodes_own_rules_refuse_is_not_asked_about(loop: SimLoop) -> None:
    probe = Asked("")
    w = world(loop, probes=(probe,))
    w.do(w.hub.assign(execution("a", resources=Resources(gpu=1))))
    assert w.until_final("a")[0].reason == "Capacity"
    assert probe.asked == []


def test_a_probe_that_has_no_answer_is_asked_again(loop: SimLoop) -> None:
    probe = Asked(None, None, "")
    w = world(loop, probes=(probe,))
    w.do(w.hub.assign(execution("a")))
    assert w.until_final("a")[0].phase is Phase.SUCCEEDED
    assert len(probe.asked) == 3


def test_a_probe_that_never_answers_is_a_fault_of_the_node_and_no_yes(loop: SimLoop) -> None:
    w = world(loop, probes=(Asked(None),))
    w.do(w.hub.assign(execution("a")))
    (report,) = w.until_final("a")
    assert (report.phase, report.reason) == (Phase.FAILED, "AdmissionFault")
    assert report.is_system_fault
    assert "the gatekeeper sleeps" in report.message
    assert w.engine.runs == {}


# -- a line that breaks while a message is being taken in ------------------------------------------


def cut_off(w: World, loop: SimLoop, telling: Coroutine[Any, Any, object], steps: int) -> None:
    """The message's handler is cancelled with its line, so many steps of the loop after it began;
    then the line is back."""

    async def cut() -> None:
        task = asyncio.ensure_future(telling)
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    loop.run_until_complete(cut())
    assert w.hub.link is not None
    w.hub.link.set_up(False)
    loop.run_until_idle()
    w.hub.link.set_up(True)


@pytest.mark.parametrize("steps", range(1, 12))
def test_what_was_stored_of_a_message_that_was_cut_off_is_done(loop: SimLoop, steps: int) -> None:
    w = world(loop)
    cut_off(w, loop, w.hub.assign(execution("a", seconds=None)), steps)
    w.until(lambda: "uid-a" in w.hub.reports and w.hub.report("a").phase is Phase.RUNNING)
    cut_off(w, loop, w.hub.assign(stopped(execution("a", seconds=None))), steps)
    assert w.until_final("a")[0].phase is Phase.STOPPED
    cut_off(w, loop, w.hub.assign(publication(execution("a"))), steps)
    w.until(lambda: "pub-a" in w.hub.publication_reports)
    assert w.hub.problems == []
