"""What a node says of itself reaches the orchestrator in the end, whichever answers get lost."""

from collections.abc import Iterator

import pytest

from bacalhau_api.errors import TransientError, UnavailableError
from bacalhau_api.v1.node import HeldInput, NodeInfo
from bacalhau_api.wire import Beat, Hello, Refused
from bacalhau_controllers.runner.fakes import Reply, Request
from bacalhau_controllers.runner.ports import Health
from tests.support.runner import Hub, World
from tests.support.simclock import SimLoop

NOT_YET = Refused(node="", session="", reason="Starting", message="not yet", again_seconds=0)


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    with SimLoop() as made:
        yield made


def test_what_went_unanswered_and_changed_back_is_said_again(
    loop: SimLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The orchestrator took in that the engine is out of order; the node never learned that it did.
    When the engine is well again, all is as the node last knew it to be known, and yet it is news."""
    heard: list[NodeInfo] = []
    serve = Hub.serve

    async def forgetful(self: Hub, request: Request) -> Reply:
        reply = await serve(self, request)
        if isinstance(request, Beat | Hello) and request.info is not None:
            heard.append(request.info)
            if not request.info.engines[0].available:
                raise UnavailableError("the answer was lost")
        return reply

    async def sick() -> Health:
        return Health(is_available=False, reason="out of order")

    monkeypatch.setattr(Hub, "serve", forgetful)
    w = World(loop)
    w.start()
    w.until(lambda: bool(heard), seconds_max=60)
    with monkeypatch.context() as patch:
        patch.setattr(w.engine, "health", sick)
        w.until(lambda: not heard[-1].engines[0].available, seconds_max=120)
    w.until(lambda: w.live.info().engines[0].available, seconds_max=120)
    loop.advance(12)
    assert heard[-1].engines[0].available


def test_which_inputs_are_here_is_told_when_it_changes(loop: SimLoop) -> None:
    class Shelf:
        held: tuple[HeldInput, ...] = ()

        async def held_inputs(self) -> tuple[HeldInput, ...]:
            if not self.held:
                raise TransientError("the disk is busy")
            return self.held

    w = World(loop)
    shelf = w.inventory = Shelf()
    w.start()
    loop.run_until_idle()
    assert w.live.info().held_inputs == ()
    shelf.held = (HeldInput(key="k", size_bytes=5, total_bytes=9),)
    w.until(
        lambda: any(b.info and b.info.held_inputs == shelf.held for b in w.hub.beats),
        seconds_max=30,
    )
    shelf.held = ()
    loop.advance(30)
    assert w.live.info().held_inputs, "what could not be asked is as it was"


def test_a_new_line_is_tried_at_once_however_the_last_one_did(loop: SimLoop) -> None:
    """The orchestrator is away while the line is up, as when it starts again behind its NATS."""
    w = World(loop)
    w.start()
    line = w.hub.link
    assert line is not None
    w.hub.refuse = NOT_YET
    loop.advance(300)
    w.hub.refuse = None
    said = len(w.hub.hellos)
    line.set_up(False)
    loop.advance(0.1)
    line.set_up(True)
    loop.advance(0.1)
    assert len(w.hub.hellos) == said + 1


def test_an_earlier_line_makes_nobody_wait(loop: SimLoop) -> None:
    """Several restarts of NATS in a row, each with a hello that came too early."""
    w = World(loop)
    w.start()
    line = w.hub.link
    assert line is not None
    for _ in range(8):
        loop.advance(3)
        line.set_up(False)
        w.hub.refuse = NOT_YET
        line.set_up(True)
        loop.advance(0.1)
        w.hub.refuse = None
        said = len(w.hub.hellos)
        loop.advance(1)
        assert len(w.hub.hellos) == said + 1
