"""The embedded NATS server: started, verified, supervised, and told who its nodes are.

What it is told is rendered by `config.py`; how its process is tied to ours is in `process.py`.
"""

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import httpx

from bacalhau.nats.binary import SERVER_VERSION, find_server
from bacalhau.nats.config import (
    LOOPBACK,
    NatsSettings,
    NodeUser,
    Runtime,
    TlsFiles,
    render_config,
    sift_nodes,
)
from bacalhau.nats.connection import Credentials
from bacalhau.nats.keys import load_or_make_seed, public_key, write_private
from bacalhau.nats.process import DataLock, ServerProcess
from bacalhau_api.errors import TerminalError, UnavailableError

__all__ = ["EmbeddedNats", "NatsSettings", "NodeUser", "TlsFiles", "render_config"]

logger = logging.getLogger(__name__)

PORT_TAKEN: Final = "PortTaken"

_PORT_TRIES: Final = 3
_LOCK_SECONDS = 3.0
_STOP_SECONDS = 5.0
_RELOAD_SECONDS = 10.0
_HTTP_SECONDS = 2.0
_READY_POLL_SECONDS = 0.01
_HEALTH_EVERY_SECONDS: Final = 5.0
_HEALTH_FAILURES_MAX: Final = 3
_RESTART_PAUSE_MIN = 0.1
_RESTART_PAUSE_MAX = 2.0
_STEADY_SECONDS = 10.0
_MEMORY_MIN = 512 * 1024 * 1024
_LOG_TAIL_BYTES = 2000
_KEY_REMEDY: Final = "delete it: the next start makes another, and nothing else depends on it"


class EmbeddedNats:
    """One server on one data directory, for the life of this object."""

    def __init__(self, settings: NatsSettings) -> None:
        self._settings = settings
        self._lock = DataLock(settings.data_dir / "lock")
        self._config_file = settings.data_dir / "nats-server.conf"
        self._output_file = settings.data_dir / "nats-server.out"
        self._nodes: tuple[NodeUser, ...] = ()
        self._runtime: Runtime | None = None
        self._controller_seed = ""
        self._system_seed = ""
        self._binary = Path()
        self._process: ServerProcess | None = None
        self._http: httpx.AsyncClient | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._reloading = asyncio.Lock()
        self._pid = 0
        self.restarts = 0

    @property
    def url(self) -> str:
        """Where the controllers connect."""
        host = self._settings.host
        host = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(host, host)
        return self._url(host)

    @property
    def node_url(self) -> str:
        """Where nodes connect."""
        host = self._settings.advertise or self._settings.host
        if host in ("0.0.0.0", "::", ""):
            host = socket.gethostname()
        return self._url(host)

    @property
    def credentials(self) -> Credentials:
        """Those of the controllers: whoever has them may do everything with the store."""
        return Credentials(seed=self._controller_seed)

    @property
    def system_credentials(self) -> Credentials:
        """Those of the system account, for events such as disconnects of nodes."""
        return Credentials(seed=self._system_seed)

    @property
    def tls(self) -> ssl.SSLContext | None:
        """How the controllers trust the server, if it uses TLS: exactly its own certificate."""
        files = self._settings.tls
        if files is None:
            return None
        context = ssl.create_default_context(cafile=str(files.cert_file))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.check_hostname = False
        if files.ca_file is not None:
            context.load_cert_chain(files.cert_file, files.key_file)
        return context

    @property
    def monitor_url(self) -> str:
        """The server's own HTTP monitor, on loopback."""
        return f"http://{LOOPBACK}:{self._running.monitor_port}"

    @property
    def is_running(self) -> bool:
        """Whether the program runs; it may still be getting ready."""
        return self._process is not None and self._process.is_running

    @property
    def pid(self) -> int:
        """The process id of the server that was started last."""
        return self._pid

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, nodes: Sequence[NodeUser] = ()) -> None:
        """Start the server and return once it is ready.

        Raises TerminalError (no program of the right version, or it does not keep its promises
        about the disk), UnavailableError (data directory in use, port taken, not ready in time).
        """
        settings = self._settings
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._binary = await asyncio.to_thread(find_server, settings.binary)
        await self._lock.take(_LOCK_SECONDS)
        try:
            self._controller_seed = load_or_make_seed(
                settings.data_dir / "controller.nk", _KEY_REMEDY
            )
            self._system_seed = load_or_make_seed(settings.data_dir / "system.nk", _KEY_REMEDY)
            self._nodes = tuple(nodes)
            # Plain HTTP on this machine: no proxy of the environment, no certificates to load.
            self._http = httpx.AsyncClient(timeout=_HTTP_SECONDS, trust_env=False, verify=False)
            if settings.relaxed:
                logger.warning("Store runs with relaxed durability")
            await self._launch_on_free_ports()
        except BaseException:
            await self.stop()
            raise
        self._supervisor = asyncio.create_task(self._supervise(), name="nats supervisor")

    async def stop(self) -> None:
        """Stop the server (milliseconds), and give the data directory back."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        process, self._process = self._process, None
        if process is not None:
            await process.stop(_STOP_SECONDS)
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()
        self._lock.release()

    async def supervised(self) -> None:
        """Lasts for as long as the server is kept running, and raises what put an end to that."""
        assert self._supervisor is not None
        await asyncio.shield(self._supervisor)

    async def set_nodes(self, nodes: Sequence[NodeUser]) -> tuple[NodeUser, ...]:
        """Say which nodes may sign in. Those that stay keep their connections, those left out are
        cut off. In force when it returns, or with the next start if the server is down just now.

        Returns those that may. One whose key is bad is left out and logged; of two with one key,
        the first may. Raises UnavailableError if the server did not take it.
        """
        async with self._reloading:
            good, problems = sift_nodes(nodes, self._running)
            for problem in problems:
                logger.error("Node cannot sign in", extra={"problem": str(problem)})
            self._nodes = tuple(good)
            process = self._process
            if process is None or not self.is_running:
                self._write_config()
                return self._nodes
            try:
                async with asyncio.timeout(_RELOAD_SECONDS):
                    before = await self._wait_loaded(process, "")
                    self._write_config()
                    process.send(signal.SIGHUP)
                    await self._wait_loaded(process, before)
            except TimeoutError:
                raise UnavailableError(
                    f"the NATS server did not take its new configuration: {self._log_tail()}"
                ) from None
            return self._nodes

    @property
    def _running(self) -> Runtime:
        if self._runtime is None:
            raise UnavailableError("the embedded NATS server was not started")
        return self._runtime

    def _url(self, host: str) -> str:
        scheme = "tls" if self._settings.tls else "nats"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._running.port}"

    async def _launch_on_free_ports(self) -> None:
        """A port that was free may be taken by somebody else before the server has it."""
        for left in reversed(range(_PORT_TRIES)):
            self._runtime = Runtime(
                port=self._settings.port or _free_port(self._settings.host),
                monitor_port=_free_port(LOOPBACK),
                controller_key=public_key(self._controller_seed),
                system_key=public_key(self._system_seed),
            )
            try:
                return await self._launch()
            except UnavailableError as error:
                if error.reason != PORT_TAKEN or not left:
                    raise

    async def _launch(self) -> None:
        """Start the program, wait until it is ready, and verify what it says of itself."""
        self._write_config()
        process = ServerProcess(
            [self._binary, "-c", self._config_file],
            environment={**os.environ, "GOMEMLIMIT": str(_memory_limit())},
            output=self._output_file,
            inherited=[self._lock.handle],
        )
        try:
            self._pid = await process.start()
            self._process = process
            self._lock.note(self._pid)
            self._verify(await self._until_ready(process))
        except BaseException:
            await process.stop(_STOP_SECONDS)
            raise

    def _write_config(self) -> None:
        text = render_config(self._settings, self._running, self._nodes)
        try:
            write_private(self._config_file, text)
        except OSError as error:
            raise UnavailableError(
                f"cannot write {self._config_file}: {error}",
                hint="is the disk full, or the data directory not writable?",
            ) from error

    async def _until_ready(self, process: ServerProcess) -> dict[str, Any]:
        """What the server says of itself once it is ready."""
        seconds = self._settings.start_seconds_max
        ready = asyncio.create_task(self._wait_ready())
        ended = asyncio.create_task(process.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                tail = self._log_tail()
                raise UnavailableError(
                    f"the NATS server ended at once: {tail}",
                    reason=PORT_TAKEN if "address already in use" in tail else "",
                    hint="is the port taken, the disk full, or the data directory not writable?",
                )
            if not ready.done():
                raise UnavailableError(
                    f"the NATS server was not ready within {seconds:g} s: {self._log_tail()}"
                )
            return ready.result()
        finally:
            for task in (ready, ended):
                task.cancel()
            await asyncio.gather(ready, ended, return_exceptions=True)

    async def _wait_ready(self) -> dict[str, Any]:
        while True:
            # On a busy machine one answer may take too long: it is asked again.
            with contextlib.suppress(httpx.HTTPError, ValueError):
                if await self._is_healthy():
                    return await self._ask("/varz")
            await asyncio.sleep(_READY_POLL_SECONDS)

    async def _wait_loaded(self, process: ServerProcess, before: str) -> str:
        """When the server loaded the configuration that it has, another than that of `before`."""
        while True:
            loaded = await self._loaded_at()
            if not process.is_running or loaded not in ("", before):
                return loaded
            await asyncio.sleep(_READY_POLL_SECONDS)

    def _verify(self, varz: dict[str, Any]) -> None:
        """Nothing may be acknowledged before it is on disk. We asked for that; make sure."""
        config = varz.get("jetstream", {}).get("config", {})
        if varz.get("version") != SERVER_VERSION:
            raise TerminalError(
                f"another NATS server answers on {self.monitor_url}: {varz.get('version')}"
            )
        if not self._settings.relaxed and config.get("sync_always") is not True:
            raise TerminalError(
                "the NATS server does not sync each write to disk; refusing to use it",
                reason="NotDurable",
            )

    async def _supervise(self) -> None:
        pause = _RESTART_PAUSE_MIN
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            process = self._process
            assert process is not None
            if process.is_running:
                await self._watch_over(process)
            await process.stop(_STOP_SECONDS)
            if loop.time() - started > _STEADY_SECONDS:
                pause = _RESTART_PAUSE_MIN
            logger.error(
                "NATS server ended and is started again",
                extra={"status": await process.wait(), "log": self._log_tail(), "pause": pause},
            )
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, _RESTART_PAUSE_MAX)
            self.restarts += 1
            try:
                await self._launch()
            except Exception as error:  # noqa: BLE001 a full disk, or whatever it is, may pass
                logger.error("Failed to start the NATS server", extra={"error": repr(error)})

    async def _watch_over(self, process: ServerProcess) -> None:
        """Return when the server has ended, or has been unwell for too long: an I/O error freezes
        its streams until it is started again."""
        failures = 0
        while failures < _HEALTH_FAILURES_MAX:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEALTH_EVERY_SECONDS):
                    await process.wait()
                return
            failures = 0 if await self._is_healthy() else failures + 1
        logger.error("NATS server is unwell", extra={"log": self._log_tail()})

    async def _is_healthy(self) -> bool:
        try:
            return (await self._ask("/healthz")).get("status") == "ok"
        except (httpx.HTTPError, ValueError):
            return False

    async def _loaded_at(self) -> str:
        """When the server last took a configuration, in its own words."""
        try:
            return str((await self._ask("/varz")).get("config_load_time", ""))
        except (httpx.HTTPError, ValueError):
            return ""

    async def _ask(self, path: str) -> dict[str, Any]:
        assert self._http is not None
        answer: dict[str, Any] = (await self._http.get(self.monitor_url + path)).json()
        return answer

    def _log_tail(self) -> str:
        tails = []
        for path in (self._output_file, self._settings.log_file):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(max(path.stat().st_size - _LOG_TAIL_BYTES, 0))
                tails += file.read().decode(errors="replace").strip().splitlines()[-4:]
        return "; ".join(tails)


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _memory_limit() -> int:
    """What Go's collector aims at: a quarter of the machine's memory."""
    return max(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4, _MEMORY_MIN)
