"""A world without bad luck: one orchestrator, named machines, and a script that says what happens
when. The parts are those of the random world, so reconcilers, gateway and agents are the real ones.
"""

from asyncio import Future
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Self

from bacalhau.server.actions import Actions
from bacalhau_api.meta import Contact, ObjectMeta, Ref
from bacalhau_api.v1.execution import Acceptance, Execution
from bacalhau_api.v1.job import Job, JobSpec, Resources
from bacalhau_api.v1.node import Node
from tests.simulation.world.faults import Faults
from tests.simulation.world.life import PartyClock
from tests.simulation.world.machines import Machine
from tests.simulation.world.orchestrators import Orchestrator
from tests.simulation.world.world import World

ROOMY = Resources(cpu_millis=64_000, memory_bytes=1 << 36, disk_bytes=1 << 36)
USER = "user:alice"


class Script:
    """Enter it; then let things happen, and time pass. `machines` are names and their labels;
    `rates` the speeds of clocks that are not right, by machine."""

    def __init__(
        self, machines: Mapping[str, Mapping[str, str]], *, rates: Mapping[str, float] | None = None
    ) -> None:
        rates = rates or {}
        world = self.world = World(0, Faults.none())
        world.machines, world.node_names = [], list(machines)
        self.orchestrator = Orchestrator(world, "orchestrator", world.fork())
        world.orchestrators = [self.orchestrator]
        self.machines: dict[str, Machine] = {}
        for name, labels in machines.items():
            machine = self.machines[name] = world.add_machine(name, name)
            machine.capacity, machine.labels = ROOMY, dict(labels)
            if name in rates:
                machine.clock = PartyClock(world.loop, rate=rates[name])
                machine.engine._clock = machine.clock

    def __enter__(self) -> Self:
        world = self.world
        world.loop.__enter__()
        for name in self.machines:
            self._do(world.users.enrol(name))
        self.orchestrator.start()
        for machine in self.machines.values():
            machine.start()
        self.until(lambda: all(self._is_ready(name) for name in self.machines))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        world = self.world
        if error is None:
            assert self.orchestrator.manager is not None
            world.checker.buried("orchestrator", self.orchestrator.manager)
        self.orchestrator.kill()
        for machine in self.machines.values():
            machine.kill()
        world.loop.run_until_idle()
        world.loop.__exit__(kind, error, trace)
        if error is None and world.violation is not None:
            raise world.violation

    # -- time ------------------------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Let time pass. Raises Violation if an invariant broke meanwhile."""
        self.world.loop.advance(seconds)
        if self.world.violation is not None:
            raise self.world.violation

    def until(self, is_true: Callable[[], bool], seconds_max: float = 600.0) -> float:
        """Let time pass until something is so; the seconds that it took."""
        began = self.world.now
        self.world.loop.run_until(is_true, seconds_max=seconds_max)
        if self.world.violation is not None:
            raise self.world.violation
        return self.world.now - began

    # -- what people do --------------------------------------------------------------------------

    def apply(self, name: str, spec: JobSpec) -> None:
        """Submit a job."""
        job = Job(metadata=ObjectMeta(name=name), spec=spec)
        self._act(lambda actions: actions.apply_job(job, USER))

    def cordon(self, name: str, *, unschedulable: bool = True) -> None:
        """Whether a node gets new work."""
        self._act(
            lambda actions: actions.set_schedulable(
                name, USER, unschedulable=unschedulable, drain=False
            )
        )

    # -- what is stored --------------------------------------------------------------------------

    def job(self, name: str) -> Job:
        """A job as it is stored."""
        found = self.world.store.peek(Ref("Job", "default", name))
        assert isinstance(found, Job)
        return found

    def attempts(self, job: str) -> list[Execution]:
        """A job's executions, in order of their attempts."""
        found = [e for e in self.world.store.everything("Execution") if isinstance(e, Execution)]
        return sorted((e for e in found if e.spec.job == job), key=lambda e: e.spec.attempt)

    def accepted(self, job: str) -> list[str]:
        """The names of the executions whose results a job has taken."""
        found = self.world.store.everything("Acceptance")
        return [a.spec.execution for a in found if isinstance(a, Acceptance) and a.spec.job == job]

    # -- what happens to machines ----------------------------------------------------------------

    def cut(self, name: str) -> None:
        """The cable is pulled; the client notices when its pings are not answered."""
        line = self.machines[name].line
        line.up = line.down = False

        def notice() -> None:
            line.set_connected(line.up and line.down)

        self.world.later(10.0, notice)

    def mend(self, name: str) -> None:
        """The cable is plugged in again."""
        line = self.machines[name].line
        line.up = line.down = True
        self.world.later(1.0, lambda: line.set_connected(line.up and line.down))

    def end(self, name: str, job_prefix: str, exit_code: int = 0) -> None:
        """What runs on a machine for these jobs ends by itself."""
        engine = self.machines[name].engine
        for run_id in engine.running():
            if run_id.startswith(job_prefix):
                engine.end(run_id, exit_code)

    def running(self, job_prefix: str) -> list[str]:
        """`machine run` of whatever really runs for these jobs."""
        return [
            f"{machine} {run}"
            for machine in self.machines.values()
            for run in machine.engine.running()
            if run.startswith(job_prefix)
        ]

    # -- inner parts -----------------------------------------------------------------------------

    def _is_ready(self, name: str) -> bool:
        node = self.world.store.peek(Ref("Node", "", name))
        agent = self.machines[name].agent
        return (
            isinstance(node, Node)
            and node.status.contact is Contact.REACHABLE
            and agent is not None
            and agent.is_welcome
        )

    def _act(self, call: Callable[[Actions], Coroutine[Any, Any, object]]) -> None:
        """As a request to the orchestrator's API."""
        life, actions = self.orchestrator.life, self.orchestrator.actions
        assert life is not None
        assert actions is not None
        self._wait_for(life.spawn(call(actions), "user"))

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """By the world's own hand."""
        self._wait_for(self.world.loop.create_task(work, context=self.world.context))

    def _wait_for(self, task: "Future[Any]") -> None:
        self.world.loop.run_until(task.done)
        task.result()
