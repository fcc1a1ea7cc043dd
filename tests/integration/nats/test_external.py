"""Servers that are not ours: what is refused, what is warned of."""

from pathlib import Path

import pytest

from bacalhau.nats.connection import Connection
from bacalhau.nats.external import check_external
from bacalhau.store.stream import Stream
from bacalhau_api.errors import InvalidError
from tests.support.nats import open_connection, running_server


async def test_a_fitting_server_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_server(tmp_path) as server, open_connection(server) as connection:
        await check_external(connection)
    assert "Durability of the NATS server is not known" in caplog.text


async def test_an_account_without_jetstream_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        connection = Connection(server.url, server.system_credentials)
        await connection.open()
        with pytest.raises(InvalidError, match="JetStream"):
            await check_external(connection)
        await connection.close()


async def test_an_older_stream_is_brought_up_to_date(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server, open_connection(server) as connection:
        stream = Stream(connection)
        old = {"name": stream.name, "subjects": ["o.>"], "max_msgs_per_subject": 1,
               "storage": "file", "discard": "new", "deny_delete": True}  # fmt: skip
        await stream.api(f"$JS.API.STREAM.CREATE.{stream.name}", old)
        before = await stream.info()
        after = await stream.ensure()
        assert after.created == before.created
        config = (await stream.api(f"$JS.API.STREAM.INFO.{stream.name}", {}))["config"]
        assert config["allow_atomic"] is True
        assert config["allow_msg_ttl"] is True
        assert config["subjects"] == ["o.>", "h.>", "l.>", "f.>"]
        assert (await stream.ensure()).created == after.created
