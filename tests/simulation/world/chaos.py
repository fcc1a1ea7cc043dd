"""Makes things go wrong, at random times, and puts them right again after a while."""

import itertools
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from tests.simulation.world.faults import Fault
from tests.simulation.world.machines import Machine

if TYPE_CHECKING:
    from tests.simulation.world.world import World


class Chaos:
    """The world's bad luck. `run` until it is cancelled, then heal the world."""

    def __init__(self, world: "World", rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._happenings: dict[Fault, Callable[[], None]] = {
            Fault.STORE_OUTAGE: self._store_outage,
            Fault.PARTITION: self._partition,
            Fault.ONE_WAY: self._one_way,
            Fault.FLAPPING: self._flapping,
            Fault.CRASH_ORCHESTRATOR: self._crash_orchestrator,
            Fault.CRASH_NODE: lambda: self._end(Machine.kill, 20),
            Fault.REBOOT_NODE: lambda: self._end(Machine.reboot, 30),
            Fault.WIPE_NODE: lambda: self._end(Machine.wipe, 20),
            Fault.OLD_LEDGER: lambda: self._end(Machine.restore, 20),
            Fault.NODE_OFF: lambda: self._end(Machine.reboot, 150),
            Fault.CLONE_NODE: self._clone,
            Fault.DISK_FULL: lambda: self._spell("full", self._set_full, 40),
            Fault.ENGINE_HANGS: lambda: self._spell("hangs", self._set_hanging, 40),
            Fault.ENGINE_SILENT: lambda: self._spell("silent", self._set_silent, 40),
            Fault.ENGINE_STOPS_FAIL: lambda: self._spell("stops", self._set_stops, 40),
            Fault.ENGINE_START_FAILS: lambda: self._spell("lies", self._set_lies, 30),
            Fault.ENGINE_LOSES_RUN: self._lose_run,
            Fault.INPUT_FAILS: lambda: self._spell("input", self._set_input, 20),
            Fault.PUBLISH_FAILS: lambda: self._spell("publish", self._set_publish, 30),
            Fault.COLLECT_FAILS: lambda: self._spell("collect", self._set_collect, 20),
            Fault.CLOCK_STEP: self._clock_step,
            Fault.OPERATOR: lambda: self._world.users.operate(),
            Fault.WATCH_STALLS: self._watch_stall,
        }

    async def run(self) -> None:
        """Trouble, one after the other."""
        world, rng = self._world, self._rng
        weights = {f: world.faults.rate(f) for f in self._happenings if world.faults.rate(f)}
        total = sum(weights.values())
        if not total:
            return
        kinds, parts = list(weights), list(itertools.accumulate(weights.values()))
        while True:
            await world.clock.sleep(rng.expovariate(total / 60.0))
            (fault,) = rng.choices(kinds, cum_weights=parts)
            world.note("fault", fault)
            self._happenings[fault]()

    def _machine(self) -> Machine:
        return self._rng.choice(self._world.machines)

    # -- processes -------------------------------------------------------------------------------

    def _crash_orchestrator(self) -> None:
        one = self._rng.choice(self._world.orchestrators)
        one.kill()
        self._world.later(self._rng.choice([0.1, 3.0, 30.0]) * self._rng.random(), one.start)

    def _end(self, how: Callable[[Machine], None], seconds_max: float) -> None:
        machine = self._machine()
        if machine.is_retired:
            return
        how(machine)
        self._world.later(self._rng.uniform(0.05, seconds_max), machine.start)

    def _clone(self) -> None:
        world = self._world
        twin = self._machine()
        if twin.is_retired or len(world.machines) > len(world.node_names) + 1:
            return
        clone = world.add_machine(f"{twin.node}-clone{len(world.machines)}", twin.node)
        clone.take_disk_of(twin)
        clone.start()

        def retire() -> None:
            clone.reboot()
            clone.is_retired = True
            clone.engine.runs.clear()

        world.later(self._rng.uniform(5, 60), retire)

    # -- spells ----------------------------------------------------------------------------------

    def _spell(
        self, what: str, change: Callable[[Machine, bool], None], seconds_max: float
    ) -> None:
        machine = self._machine()
        self._world.note(what, machine, "on")
        change(machine, True)

        def end() -> None:
            self._world.note(what, machine, "off")
            change(machine, False)

        self._world.later(self._rng.uniform(1, seconds_max), end)

    def _set_full(self, machine: Machine, is_on: bool) -> None:
        machine.ledger.is_full = is_on

    def _set_hanging(self, machine: Machine, is_on: bool) -> None:
        machine.engine.starts_hang = is_on

    def _set_silent(self, machine: Machine, is_on: bool) -> None:
        machine.engine.is_silent = is_on

    def _set_stops(self, machine: Machine, is_on: bool) -> None:
        machine.engine.stops_fail = is_on

    def _set_lies(self, machine: Machine, is_on: bool) -> None:
        machine.engine.start_lies = is_on

    def _set_input(self, machine: Machine, is_on: bool) -> None:
        machine.storage.is_failing = is_on

    def _set_publish(self, machine: Machine, is_on: bool) -> None:
        machine.publisher.is_failing = is_on

    def _set_collect(self, machine: Machine, is_on: bool) -> None:
        machine.workspace.is_failing = is_on

    def _lose_run(self) -> None:
        machine = self._machine()
        running = machine.engine.running()
        if not running:
            return
        run_id = self._rng.choice(running)
        self._world.note("lost-run", machine, run_id)
        match self._rng.randrange(3):
            case 0:
                machine.engine.lose(run_id)
                # Nobody can tell a run that was removed by hand from one that never began.
                machine.engine.started.pop(run_id)
            case 1:
                machine.engine.vanish(run_id)
            case _:
                self._world.checker.blame_workload(run_id)
                machine.engine.end(run_id, 137, "OutOfMemory")

    # -- lines and clocks ------------------------------------------------------------------------

    def _partition(self) -> None:
        self._cut(self._machine(), up=False, down=False, seconds=self._rng.uniform(1, 120))

    def _one_way(self) -> None:
        up = self._rng.random() < 0.5
        self._cut(self._machine(), up=up, down=not up, seconds=self._rng.uniform(1, 90))

    def _flapping(self) -> None:
        machine, period = self._machine(), self._rng.choice([1.0, 5.0, 15.0])
        for turn in range(self._rng.randint(3, 12)):
            self._world.later(
                2 * turn * period,
                lambda: self._cut(machine, up=False, down=False, seconds=period),
            )

    def _cut(self, machine: Machine, *, up: bool, down: bool, seconds: float) -> None:
        world, line = self._world, machine.line
        if world.is_healed:
            return
        world.note("cut", machine, f"up={up} down={down} for {seconds:.1f}")
        line.up, line.down = up, down
        # A client notices when a ping is not answered, and comes back some time after the line.
        noticed = self._rng.uniform(0, 30)
        if noticed < seconds:
            world.later(noticed, lambda: line.set_connected(line.up and line.down))

        def mend() -> None:
            world.note("mend", machine)
            line.up = line.down = True
            world.later(self._rng.uniform(0, 3), lambda: line.set_connected(line.up and line.down))

        world.later(seconds, mend)

    def _store_outage(self) -> None:
        one = self._rng.choice(self._world.orchestrators)
        store = one.store
        if store is None:
            return
        self._world.note("outage", one)
        store.is_cut_off = True

        def end() -> None:
            store.is_cut_off = False

        self._world.later(self._rng.uniform(1, 40), end)

    def _watch_stall(self) -> None:
        one = self._rng.choice(self._world.orchestrators)
        until = self._world.now + self._rng.uniform(5, 40)
        skips = self._rng.random() < 0.5
        if one.store is None:
            return
        self._world.note("stall", one, f"until {until:.1f}")
        if skips:
            one.store.blind_until = until
        else:
            one.store.stale_until = until

    def _clock_step(self) -> None:
        clocks = [one.clock for one in self._world.orchestrators]
        clocks += [one.clock for one in self._world.machines]
        clock = self._rng.choice(clocks)
        seconds = self._rng.choice([-3600.0, -60.0, -2.0, 2.0, 60.0, 3600.0, -clock.skew])
        self._world.note("clock", "step", seconds)
        clock.step(seconds)
