"""Leases where the server's clock does not go as that of their candidates."""

from pathlib import Path

import pytest

from bacalhau.store.jetstream import JetStreamStore
from bacalhau.system import SystemIds
from bacalhau_api.errors import FencedError
from tests.support.nats import open_connection, open_store, running_server
from tests.support.stores import ManualClock


async def test_a_lease_that_nobody_renews_ends_whatever_the_servers_clock_says(
    tmp_path: Path,
) -> None:
    """The server's clock was set back by hours, and with it the end of a dead holder's lease. Here the
    candidate's own goes faster, which is the same for it."""
    clock = ManualClock()
    async with (
        running_server(tmp_path) as server,
        open_store(server) as store,
        open_connection(server) as connection,
        JetStreamStore(connection, clock, SystemIds()) as candidate,
    ):
        dead = await store.acquire_lease("leader", "dead", 600)
        assert dead is not None
        for _ in range(3):
            assert await candidate.acquire_lease("leader", "candidate", 12) is None
            await clock.sleep(400)
            dead = await store.renew_lease(dead, 600)
        assert await candidate.acquire_lease("leader", "candidate", 12) is None
        await clock.sleep(850)
        assert await candidate.acquire_lease("leader", "candidate", 12) is None
        await clock.sleep(100)
        taken = await candidate.acquire_lease("leader", "candidate", 12)
        assert taken is not None
        assert taken.token > dead.token
        with pytest.raises(FencedError):
            await store.renew_lease(dead, 600)
