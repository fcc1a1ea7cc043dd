"""A node that the orchestrator does not know says so once, and not while one merely starts."""

import asyncio

import pytest

from bacalhau.node.refusal import LOOK_SECONDS, tell_refusals
from tests.support.simclock import SimClock, SimLoop


class Line:
    """A line that says why it is down."""

    address = "nats://o:4222"
    last_error = ""


def test_a_refusal_that_lasts_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    line = Line()
    refused = "nats: 'Authorization Violation'"
    with SimLoop() as loop:
        telling = loop.create_task(tell_refusals(line, "n1", SimClock(loop)))
        line.last_error = refused
        loop.advance(LOOK_SECONDS * 1.5)
        line.last_error = ""
        loop.advance(LOOK_SECONDS)
        assert not caplog.records, "an orchestrator that starts knows nobody for a moment"
        line.last_error = refused
        loop.advance(600)
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "refuses this node" in record.message
        line.last_error = "connection refused"
        loop.advance(600)
        line.last_error = refused
        loop.advance(600)
        assert len(caplog.records) == 2
        telling.cancel()
        loop.run_until_complete(asyncio.gather(telling, return_exceptions=True))
