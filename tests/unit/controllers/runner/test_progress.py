"""Users see how far inputs and uploads are, and how fast they go."""

from pathlib import Path
from typing import Any

from bacalhau_api.v1.execution import Phase, Publication
from bacalhau_api.v1.job import SpecConfig
from bacalhau_controllers.runner.fakes import FakePublisher, FakeStorage
from bacalhau_controllers.runner.ports import Fetched, Progress, Use
from tests.support.runner import World, execution, publication
from tests.support.simclock import SimClock, SimLoop

MIB = 1024 * 1024


class SlowStorage(FakeStorage):
    """Brings 64 MiB at 2 MiB a second."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__()
        self._clock = clock
        self._began: dict[Path, float] = {}
        self.uses: list[Use] = []

    async def fetch(self, item: Any, into: Path, use: Use) -> Fetched:
        self.uses.append(use)
        self._began[into] = self._clock.monotonic()
        await self._clock.sleep(32)
        del self._began[into]
        return await super().fetch(item, into, use)

    def progress(self, into: Path) -> Progress | None:
        if into not in self._began:
            return None
        return Progress(int((self._clock.monotonic() - self._began[into]) * 2 * MIB), 64 * MIB)


def test_progress_and_rate_are_reported_while_inputs_come() -> None:
    with SimLoop() as loop:
        world = World(loop)
        storage = SlowStorage(world.clock)
        world.storage = storage
        world.start()
        loop.run_until_idle()
        world.do(world.hub.assign(execution("a", seconds=3, inputs=("/x",))))
        words: list[str] = []

        def collect() -> bool:
            report = world.hub.reports.get("uid-a")
            waiting = report.waiting if report and report.phase is Phase.PREPARING else None
            if waiting and waiting.message not in words:
                words.append(waiting.message)
            return report is not None and report.phase.is_final

        world.until(collect)
        told = [text for text in words if text]
        assert "10 of 64 MiB, 2.0 MiB/s" in told
        assert "60 of 64 MiB, 2.0 MiB/s" in told
        assert len(told) <= 7, "now and then, not all the time"
        (use,) = storage.uses
        assert (use.execution, use.index, use.partition) == ("a", 0, 0)
        world.kill()


class SlowPublisher(FakePublisher):
    """Sends 64 MiB at 2 MiB a second."""

    def __init__(self, clock: SimClock) -> None:
        super().__init__()
        self._clock = clock
        self._began: dict[str, float] = {}

    async def publish(self, publication: Publication, outputs: Path) -> SpecConfig:
        uid = publication.metadata.uid
        self._began[uid] = self._clock.monotonic()
        try:
            await self._clock.sleep(32)
        finally:
            del self._began[uid]
        return await super().publish(publication, outputs)

    def progress(self, uid: str) -> Progress | None:
        if uid not in self._began:
            return None
        return Progress(int((self._clock.monotonic() - self._began[uid]) * 2 * MIB), 64 * MIB)


def test_progress_and_rate_are_reported_while_outputs_go() -> None:
    with SimLoop() as loop:
        world = World(loop)
        world.publisher = SlowPublisher(world.clock)
        world.start()
        loop.run_until_idle()
        one = execution("a", seconds=3)
        world.do(world.hub.assign(one))
        world.until(
            lambda: "uid-a" in world.hub.reports and world.hub.reports["uid-a"].phase.is_final
        )
        world.do(world.hub.assign(publication(one)))
        words: list[str] = []
        deadlines = set()

        def collect() -> bool:
            report = world.hub.publication_reports.get("pub-a")
            if report and report.waiting and report.waiting.message not in words:
                words.append(report.waiting.message)
                deadlines.add(report.waiting.until)
            return report is not None and report.phase.is_final

        world.until(collect)
        assert words[0] == ""
        assert "10 of 64 MiB, 2.0 MiB/s" in words
        assert "60 of 64 MiB, 2.0 MiB/s" in words
        assert len(words) <= 8, "now and then, not all the time"
        assert len(deadlines) == 1, "it has to be there by when it had to from the beginning"
        world.kill()
