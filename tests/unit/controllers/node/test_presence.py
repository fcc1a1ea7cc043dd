"""Presence: who is heard from, in virtual time."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bacalhau_api.meta import Ref
from bacalhau_api.v1.node import NodeInfo
from bacalhau_controllers.node.presence import Presence
from tests.support.simclock import SimClock, simulate

INFO = NodeInfo(version="1")


@asynccontextmanager
async def opened(clock: SimClock) -> AsyncIterator[tuple[Presence, list[str]]]:
    presence, woken = Presence(clock), list[str]()

    def wake(ref: Ref) -> None:
        woken.append(ref.name)

    async with presence.term(wake):
        yield presence, woken


def test_beats_keep_a_node_connected_and_wake_nobody() -> None:
    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, woken):
            presence.hello("n1", "i", INFO, "s")
            assert woken == ["n1"]
            for _ in range(100):
                await clock.sleep(5)
                assert presence.heard("n1", clock.monotonic())
            assert presence.is_connected("n1")
            assert woken == ["n1"]
            assert presence.silence("n1").seconds == 0

    simulate(main)


def test_missed_beats_make_a_node_silent_and_a_word_brings_it_back() -> None:
    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, woken):
            presence.hello("n1", "i", INFO, "s")
            await clock.sleep(8)
            presence.hello("n2", "i", INFO, "s")
            woken.clear()
            await clock.sleep(6.9)
            assert woken == []
            await clock.sleep(0.2)  # 15 s after its last word
            assert woken == ["n1"]
            assert (presence.is_connected("n1"), presence.is_connected("n2")) == (False, True)
            silence = presence.silence("n1")
            assert (round(silence.seconds, 3), silence.is_whole) == (15.1, True)
            presence.heard("n1", clock.monotonic())
            assert woken == ["n1", "n1"]
            assert presence.is_connected("n1")
            await clock.sleep(100)
            assert not presence.is_connected("n1")
            assert sorted(woken[2:]) == ["n1", "n2"]  # each once

    simulate(main)


def test_a_disconnect_counts_at_once_unless_it_is_old_news() -> None:
    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, woken):
            presence.hello("n1", "i", INFO, "s1")
            presence.hello("n1", "i", INFO, "s2")
            woken.clear()
            presence.gone("n1", "s1")
            assert (presence.is_connected("n1"), woken) == (True, [])
            presence.gone("n1", "s2")
            assert (presence.is_connected("n1"), woken) == (False, ["n1"])
            presence.gone("n1")
            presence.gone("stranger")
            assert woken == ["n1"]

    simulate(main)


def test_news_about_itself_wakes_the_reconciler() -> None:
    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, woken):
            presence.hello("n1", "i", INFO, "s")
            presence.hello("n1", "i", INFO, "s")
            assert woken == ["n1"]
            presence.hello("n1", "i", NodeInfo(version="2"), "s")
            presence.hello("n1", "i2", NodeInfo(version="2"), "s2")
            assert woken == ["n1"] * 3

    simulate(main)


def test_strangers_are_told_to_say_hello() -> None:
    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, woken):
            assert not presence.heard("n1", clock.monotonic())
            assert woken == []

    simulate(main)


def test_a_new_term_knows_nobody_and_gives_a_grace() -> None:
    async def main(clock: SimClock) -> None:
        presence = Presence(clock)
        async with presence.term(lambda ref: None):
            presence.hello("n1", "i", INFO, "s")
        await clock.sleep(100)
        async with presence.term(lambda ref: None):
            assert presence.sighting("n1") is None
            await clock.sleep(10)
            silence = presence.silence("n1")
            assert (silence.seconds, silence.is_whole) == (10, False)
            assert silence.grace_left_seconds == 20
            await clock.sleep(30)
            assert presence.silence("n1").grace_left_seconds == 0

    simulate(main)


def test_a_removed_node_is_forgotten_but_not_when_it_was_last_heard() -> None:
    """Work under the policy `stop` counts from the last word, whoever removed the node since."""

    async def main(clock: SimClock) -> None:
        async with opened(clock) as (presence, _):
            await clock.sleep(500)
            presence.hello("n1", "i", INFO, "s")
            presence.forget("n1")
            await clock.sleep(3)
            assert presence.sighting("n1") is None
            assert presence.silence("n1").seconds == 3

    simulate(main)
