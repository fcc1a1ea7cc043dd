"""Does one instruction of the machine and says what came of it: an event.

This is where the runner meets the world. Errors end here: each becomes an event that the machine
has a transition for.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bacalhau_api.errors import BacalhauError, TransientError, UnavailableError
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import InputSource
from bacalhau_api.v1.node import OUTBOX_FULL
from bacalhau_controllers.runner.admission import decide, environment, resources_of
from bacalhau_controllers.runner.guard import (
    ENGINE_FAULT,
    INTERNAL,
    LOOK_SECONDS,
    GuardedEngine,
    within,
)
from bacalhau_controllers.runner.ports import (
    Fetched,
    Layout,
    Leash,
    Mount,
    Observation,
    RunPhase,
    Use,
    Workload,
)
from bacalhau_controllers.runner.rates import Rate
from bacalhau_controllers.runner.site import Site
from bacalhau_controllers.runner.state import (
    Admit,
    AdmitFailed,
    Admitted,
    Clean,
    Cleaned,
    CleanFailed,
    Collect,
    CollectDone,
    CollectFailed,
    Denied,
    EngineGone,
    Event,
    Exited,
    Fetching,
    InputMount,
    Instruction,
    Prepare,
    Prepared,
    PrepareFailed,
    Reserve,
    Reserved,
    RunnerState,
    Start,
    Started,
    StartFailed,
    Stop,
    StopDone,
    StopFailed,
    Watch,
    split_workload_id,
    workload_id,
)

logger = logging.getLogger(__name__)

DISK_FAULT = "Disk"
"""The reason of a workspace's errors."""

LEASH_SLACK_SECONDS = 2.0
"""How much later than the agent a workload ends itself: the agent's way is the orderly one."""

DISK_SECONDS = 600.0
"""For what is done on the node's own disk, per execution; but not for reading outputs."""


async def perform(
    site: Site,
    execution: Execution,
    state: RunnerState,
    todo: Instruction,
    interim: Callable[[Event], None],
) -> Event:
    """Do it, however long it takes. `interim` takes events before the last one."""
    match todo:
        case Admit():
            return await _admit(site, execution)
        case Reserve():
            uid = execution.metadata.uid
            await site.allocator.take(uid, resources_of(execution.spec.task, site.policy))
            return Reserved()
        case Prepare():
            return await _prepare(site, execution, interim)
        case Start():
            return await _start(site, execution, state, todo)
        case Watch(run):
            return await _watch(site, execution, run, interim)
        case Stop():
            return await _stop(site, execution, todo)
        case Collect(exit_code):
            return await _collect(site, execution, exit_code)
        case Clean():
            return await _clean(site, execution, state)


def broken(todo: Instruction, error: Exception) -> Event:
    """What came of an instruction that ended in an exception nobody foresaw: a bug, here or in a
    plug. It is tried again like a fault of the node, and as boundedly."""
    why = f"internal error: {error!r}"
    match todo:
        case Admit() | Reserve():
            return AdmitFailed(why)
        case Prepare():
            return PrepareFailed(True, INTERNAL, why)
        case Start(run):
            return StartFailed(run, True, INTERNAL, why)
        case Watch(run):
            return Exited(run, Observation(RunPhase.VANISHED, message=why))
        case Stop(run):
            return StopFailed(run, why)
        case Collect():
            return CollectFailed(True, INTERNAL, why)
        case Clean():
            return CleanFailed(why)


async def forget_run(site: Site, execution: Execution, run: int) -> None:
    """Free what the engine keeps of a run that is over. If it fails, the agent's sweep repeats
    it."""
    engine = site.engines.get(execution.spec.task.engine.type)
    if engine is None or run < 1:
        return
    try:
        await engine.remove(workload_id(execution, run))
    except BacalhauError as error:
        logger.info(
            "Postponed removing a run",
            extra={"execution": execution.name, "run": run, "error": error.message},
        )


async def _admit(site: Site, execution: Execution) -> Event:
    if site.room.overflow:
        # A fault of the node, so that the slot goes elsewhere and no attempt is charged. With a
        # full ledger it only waits instead: nothing can be noted.
        message = f"this node takes on no new work: {site.room.overflow}"
        return Denied(OUTBOX_FULL, message, is_system_fault=True)
    refusals: list[str] = []
    engine = site.engines.get(execution.spec.task.engine.type)
    try:
        if engine is not None and (why := await engine.admit(execution.spec.task.engine.params)):
            return Denied("EngineRefused", why)
        for item in execution.spec.task.input_sources:
            storage = site.storages.get(item.source.type)
            if storage is None:
                refusals.append("")  # said by `decide`, in words about the node
                continue
            what = f"storage {item.source.type}"
            refusals.append(await within(LOOK_SECONDS, what, storage.admit(item.source)))
    except TransientError as error:
        return AdmitFailed(error.message)
    except BacalhauError as error:
        refusals = [error.message] * len(execution.spec.task.input_sources)
    verdict = decide(execution, site.policy, site.offers(), refusals)
    return await _probed(site, execution) if isinstance(verdict, Admitted) else verdict


async def _probed(site: Site, execution: Execution) -> Event:
    """What the operator's probes say to an execution that the node's rules let through."""
    for probe in site.settings.probes:
        try:
            why = await probe.ask(execution)
        except TransientError as error:
            return AdmitFailed(error.message)
        if why:
            return Denied("ProbeRefused", f"{probe.name} refuses it: {why}")
    return Admitted()


async def _prepare(site: Site, execution: Execution, interim: Callable[[Event], None]) -> Event:
    items = execution.spec.task.input_sources
    layout = site.layout(execution)
    try:
        async with site.slots.prepares:
            await within(
                DISK_SECONDS, "making directories", site.workspace.prepare(layout, len(items))
            )
            seconds = site.limits.prepare_try_seconds
            ready = _make_ready(site, execution, interim)
            pins = await within(seconds, "getting the engine ready", ready)
            fetch = _fetch(site, execution, layout, interim)
            fetched = await within(seconds, "bringing the inputs", fetch)
    except BacalhauError as error:
        is_transient = isinstance(error, TransientError)
        reason = "InputUnavailable" if is_transient else "InputFailed"
        if error.reason.startswith(("Image", "Registry", "Engine")):
            reason = error.reason
        return PrepareFailed(is_transient, reason, error.message)
    inputs = [
        InputMount(source=str(got.source), target=item.target, read_only=got.read_only)
        for item, got in zip(items, fetched, strict=True)
    ]
    return Prepared(tuple(inputs), pins)


async def _make_ready(
    site: Site, execution: Execution, interim: Callable[[Event], None]
) -> Mapping[str, str]:
    """Have the engine bring what it needs beside the inputs."""
    spec = execution.spec.task.engine
    engine = site.engines.get(spec.type)
    if engine is None:
        return {}  # said when it is to be started

    def tell(text: str) -> None:
        interim(Fetching(text))

    return await engine.prepare(spec.params, execution.spec.pins, tell)


async def _fetch(
    site: Site, execution: Execution, layout: Layout, interim: Callable[[Event], None]
) -> list[Fetched]:
    """All inputs, a few at a time. The first failure ends the others."""
    slots = asyncio.Semaphore(site.settings.fetches_max)
    spec, items = execution.spec, execution.spec.task.input_sources

    async def fetch(number: int, item: InputSource) -> Fetched:
        storage = site.storages.get(item.source.type)
        if storage is None:
            raise UnavailableError(f"this node has no input source {item.source.type!r} any more")
        use = Use(
            namespace=execution.metadata.namespace,
            job_uid=spec.job_uid,
            generation=spec.slot.generation,
            execution=execution.name,
            index=number,
            partition=0 if spec.slot.node else spec.slot.partition,
            partitions=1 if spec.slot.node else spec.partition_count,
        )
        async with slots:
            return await storage.fetch(item, layout.input(number), use)

    tasks = [asyncio.ensure_future(fetch(number, item)) for number, item in enumerate(items)]
    teller = asyncio.create_task(_tell_progress(site, items, layout, interim))
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, teller):
            task.cancel()
        await asyncio.gather(*tasks, teller, return_exceptions=True)


async def _tell_progress(
    site: Site, items: Sequence[InputSource], layout: Layout, interim: Callable[[Event], None]
) -> None:
    """Say now and then how far the inputs are, and how fast they come. Never ends by itself."""
    rate = Rate(site.clock.monotonic())
    while True:
        await site.clock.sleep(site.settings.progress_seconds)
        places = [(site.storages.get(x.source.type), layout.input(n)) for n, x in enumerate(items)]
        known = [storage.progress(place) for storage, place in places if storage is not None]
        found = [progress for progress in known if progress is not None]
        if words := rate.of(found, site.clock.monotonic()):
            interim(Fetching(words))


async def _start(site: Site, execution: Execution, state: RunnerState, todo: Start) -> Event:
    task = execution.spec.task
    engine = site.engines.get(task.engine.type)
    if engine is None:
        message = f"this node has no engine {task.engine.type!r} any more"
        return StartFailed(todo.run, False, "EngineMissing", message)
    run_id = workload_id(execution, todo.run)
    try:
        if todo.must_look:
            seen = await engine.observe(run_id)
            if seen.phase is RunPhase.RUNNING:
                return Started(todo.run)
            if seen.phase is not RunPhase.ABSENT:
                return Exited(todo.run, seen)
        if todo.run > 1:
            # It is over as far as anybody knows; make sure, so that never two run at a time.
            await engine.stop(workload_id(execution, todo.run - 1), 0.0)
            await forget_run(site, execution, todo.run - 1)
        if execution.spec.local_deadline_seconds is not None:
            # A ledger that is new, or an old copy, may know less than the engine.
            for run, other in _runs_of(execution, await engine.list()):
                if run != todo.run:
                    await engine.stop(other, 0.0)
        layout = site.layout(execution)
        await within(
            DISK_SECONDS,
            "making directories",
            site.workspace.begin_run(
                layout,
                todo.run,
                [result.name for result in task.result_paths],
                # A batch run begins from nothing; what a run that was cut short has written must
                # not become part of the result. A service's log and files go on.
                reset=execution.spec.job_type.runs_to_completion,
            ),
        )
        await engine.start(_workload(site, execution, state, layout, todo.run))
    except TransientError as error:
        await _answers(site, engine, run_id)
        reason = error.reason if error.reason in (DISK_FAULT, INTERNAL) else ENGINE_FAULT
        return StartFailed(todo.run, True, reason, error.message)
    except BacalhauError as error:
        reason = error.reason if error.reason != "Terminal" else "StartFailed"
        return StartFailed(todo.run, False, reason, error.message)
    return Started(todo.run)


async def _answers(site: Site, engine: GuardedEngine, run_id: str) -> None:
    """Return once the engine answers, or has not for as long as a start may take: one that is away
    for a moment (a boot, an upgrade) is to cost no more than one try."""
    clock, pause = site.clock, site.limits.retry_seconds
    deadline = clock.monotonic() + site.limits.start_try_seconds
    while clock.monotonic() < deadline:
        try:
            await engine.observe(run_id)
            return
        except TransientError:
            await clock.sleep(pause)
        except BacalhauError:
            return


def _workload(
    site: Site, execution: Execution, state: RunnerState, layout: Layout, run: int
) -> Workload:
    task = execution.spec.task
    mounts = [Mount(Path(one.source), one.target, one.read_only) for one in state.inputs]
    mounts += [
        Mount(layout.result(result.name), result.path, read_only=False)
        for result in task.result_paths
    ]
    # An engine mounts them one after another; what lies inside another must come later.
    mounts.sort(key=lambda mount: mount.target)
    timeout = task.timeouts.execution_timeout
    return Workload(
        id=workload_id(execution, run),
        params=task.engine.params,
        env=environment(execution, site.policy),
        mounts=tuple(mounts),
        resources=resources_of(task, site.policy),
        network=task.network,
        directory=layout.run(run),
        stdout=layout.stdout,
        stderr=layout.stderr,
        log_index=layout.log_index,
        timeout_seconds=float(timeout) if timeout else None,
        output_bytes_max=site.settings.output_bytes_max,
        leash=_leash(site, execution),
        pins=state.pins,
    )


def _leash(site: Site, execution: Execution) -> Leash | None:
    seconds = execution.spec.local_deadline_seconds
    if seconds is None:
        return None
    now, contact = site.now(), site.book.meta.contact
    if contact is None or contact.boot != now.boot:
        contact = now  # nothing is started in a new boot before the orchestrator was heard
    slack = LEASH_SLACK_SECONDS
    return Leash(seconds + slack, contact.mono, contact.boot, site.workspace.contact_file)


async def _watch(
    site: Site, execution: Execution, run: int, interim: Callable[[Event], None]
) -> Event:
    run_id = workload_id(execution, run)
    engine = site.engines.get(execution.spec.task.engine.type)
    if engine is None:
        return Exited(run, _without_engine(execution))
    pause = site.limits.retry_seconds
    is_silent = False
    while True:
        try:
            seen = await _wait(engine, run_id, is_silent=is_silent)
        except TransientError as error:
            if not is_silent:
                interim(EngineGone(error.message))
            is_silent = True
            await site.clock.sleep(pause)
            pause = min(pause * 2, site.limits.retry_seconds_max)
            continue
        if seen.phase is not RunPhase.RUNNING:
            return Exited(run, seen)
        if is_silent:
            interim(EngineGone(""))
        is_silent = False
        pause = site.limits.retry_seconds


async def _wait(engine: GuardedEngine, run_id: str, *, is_silent: bool) -> Observation:
    # An engine that came back is asked how it is, so that one that only hangs is not believed.
    return await (engine.observe(run_id) if is_silent else engine.wait(run_id))


async def _stop(site: Site, execution: Execution, todo: Stop) -> Event:
    engine = site.engines.get(execution.spec.task.engine.type)
    if engine is None:
        return StopDone(todo.run, _without_engine(execution))
    run_id = workload_id(execution, todo.run)
    try:
        async with site.slots.stops:
            if execution.spec.local_deadline_seconds is not None:
                for run, other in _runs_of(execution, await engine.list()):
                    if run > todo.run:
                        await engine.stop(other, todo.grace_seconds)
            return StopDone(todo.run, await engine.stop(run_id, todo.grace_seconds))
    except BacalhauError as error:
        return StopFailed(todo.run, error.message)


def _runs_of(execution: Execution, found: Sequence[str]) -> list[tuple[int, str]]:
    """Of all runs in an engine, those of one execution, with their numbers."""
    parts = ((one, split_workload_id(one)) for one in found)
    return [(part[1], one) for one, part in parts if part and part[0] == execution.name]


async def _collect(site: Site, execution: Execution, exit_code: int | None) -> Event:
    layout = site.layout(execution)
    try:
        async with site.slots.collects:
            call = site.workspace.collect(layout, exit_code)
            seconds = site.limits.collect_try_seconds
            return CollectDone(await within(seconds, "summing up outputs", call))
    except BacalhauError as error:
        is_transient = isinstance(error, TransientError)
        reason = "OutputsUnreadable" if is_transient else error.reason
        return CollectFailed(is_transient, reason, error.message)


async def _clean(site: Site, execution: Execution, state: RunnerState) -> Event:
    engine = site.engines.get(execution.spec.task.engine.type)
    try:
        async with site.slots.cleans:
            if engine is not None:
                # Older runs were removed when the next began, or are by the sweep.
                for run in range(max(1, state.run - 1), state.run + 1):
                    # It may run yet: a stop that was not confirmed is given up after a while.
                    await engine.stop(workload_id(execution, run), site.limits.stop_grace_seconds)
                    await engine.remove(workload_id(execution, run))
            call = site.workspace.remove(site.layout(execution))
            await within(DISK_SECONDS, "removing directories", call)
    except BacalhauError as error:
        return CleanFailed(error.message)
    return Cleaned()


def _without_engine(execution: Execution) -> Observation:
    name = execution.spec.task.engine.type
    return Observation(RunPhase.VANISHED, message=f"this node has no engine {name!r} any more")
