"""Talks to one Docker Engine: questions through docker-py, in a few threads, and streams (events,
logs, pulls) through httpx on the event loop.

An engine can hang in any call for ever while it answers others. So every call has a deadline, the
threads that may hang are counted, and starts have threads of their own: what hangs there holds up
nothing else. Errors are this module's; the engine's words come along.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast
from urllib.parse import urlencode

import docker
import docker.constants
import docker.errors
import httpx
import requests
from docker.transport import unixconn

from bacalhau.engines.docker.options import socket_path
from bacalhau.engines.processes import read_stat
from bacalhau_api.errors import BacalhauError, UnavailableError
from bacalhau_controllers.runner.guard import ENGINE_FAULT

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINE_DOWN = "EngineDown"
_CALL_THREADS = 8
_SPARE_SECONDS = 2.0  # a call's own time limit is this much before our deadline for it
_CONNECT_SECONDS = 10.0
_LINE_BYTES_MAX = 1024 * 1024
_RAW_BYTES = 256 * 1024


class RefusedError(Exception):
    """The engine answered, with an error. `status` is that of HTTP, `message` the engine's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})")
        self.status = status
        self.message = message

    @property
    def is_version(self) -> bool:
        """Whether it is about the version of the API that was asked for."""
        return self.status == 400 and self.message.lower().startswith("client version")


class Lane:
    """A few threads. A thread that hangs keeps its place, so that only so many ever do."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"docker-{name}")
        self._free = asyncio.Semaphore(threads)

    async def run(self, call: Callable[[], T], what: str, seconds: float) -> T:
        """The call's result. Raises UnavailableError (EngineFault) after `seconds` in the call, or
        as long in the queue for it."""
        try:
            async with asyncio.timeout(seconds):
                await self._free.acquire()
        except TimeoutError:
            raise _hangs(f"{what} found no thread", seconds) from None
        loop = asyncio.get_running_loop()

        def ended(_: "Future[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._free.release)

        try:
            future = self._pool.submit(call)
        except BaseException:
            self._free.release()
            raise
        future.add_done_callback(ended)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise _hangs(what, seconds) from None

    def close(self) -> None:
        """Take no more calls. One that hangs ends by its own time limit."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class EngineClient:
    """One engine at `host` (a `unix://` address). Use from one event loop; `close` when done.

    `RefusedError` is the engine's no; UnavailableError that it cannot be reached (EngineDown) or
    does not answer in time (EngineFault).
    """

    def __init__(
        self, host: str, *, starts_max: int, call_seconds: float, start_seconds: float
    ) -> None:
        self.host = host
        self._call_seconds = call_seconds
        self._start_seconds = start_seconds
        self._calls = Lane("call", _CALL_THREADS)
        self._starts = Lane("start", starts_max)
        self._apis: dict[float, docker.APIClient] = {}
        self._connecting = asyncio.Lock()
        self._version = ""
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                uds=socket_path(host),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            ),
            base_url="http://docker",
            timeout=httpx.Timeout(_CONNECT_SECONDS, read=None, pool=None),
            trust_env=False,
        )

    @property
    def is_connected(self) -> bool:
        """Whether the engine has ever answered."""
        return bool(self._version)

    async def ask(self, method: str, *args: Any, extra_seconds: float = 0.0, **kwargs: Any) -> Any:
        """Call a method of docker-py's APIClient. `extra_seconds` is what it may take beyond the
        usual, as to stop a container with grace."""
        return await self._call(
            self._calls, self._call_seconds, extra_seconds, method, args, kwargs
        )

    async def ask_start(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The same for what starts a container, a few at a time."""
        return await self._call(self._starts, self._start_seconds, 0.0, method, args, kwargs)

    async def in_thread(self, call: Callable[[], T], what: str) -> T:
        """Something else that may block, such as a credential helper."""
        return await self._calls.run(call, what, self._call_seconds)

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        params: Mapping[str, Any],
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        read_seconds: float | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """An answer that goes on; `path` is without the API's version. `read_seconds` is how long
        it may be silent."""
        await self._api(self._call_seconds)
        timeout = httpx.Timeout(_CONNECT_SECONDS, read=read_seconds, pool=None)
        url = f"/v{self._version}{path}"
        try:
            async with self._http.stream(
                method, url, params=dict(params), headers=dict(headers or {}), timeout=timeout
            ) as response:
                if response.status_code >= 400:
                    text = (await response.aread())[:4096].decode("utf-8", "replace")
                    raise RefusedError(response.status_code, _words(text))
                yield response
        except (httpx.TimeoutException, httpx.TransportError) as error:
            what = type(error).__name__
            raise UnavailableError(
                f"the Docker engine broke off {path}: {error or what}", reason=ENGINE_DOWN
            ) from error

    async def raw(
        self, path: str, params: Mapping[str, Any], *, may_pause: bool
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of an answer that goes on, as they come, until the engine ends it. `may_pause`:
        silence is no fault, however long.

        Asked for by HTTP/1.0, where an answer has no chunks: a log has one for each line, and to
        take them apart costs more than all the rest.
        """
        await self._api(self._call_seconds)
        target = f"/v{self._version}{path}?{urlencode(params)}"
        try:
            async with asyncio.timeout(self._call_seconds):
                reader, writer = await asyncio.open_unix_connection(
                    socket_path(self.host), limit=_RAW_BYTES
                )
        except (OSError, TimeoutError) as error:
            raise UnavailableError(
                f"the Docker engine cannot be reached: {_short(error)}", reason=ENGINE_DOWN
            ) from error
        try:
            writer.write(f"GET {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
            async with asyncio.timeout(self._call_seconds):
                await writer.drain()
                head = await reader.readuntil(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1])
                if status >= 400:
                    text = await reader.read(4096)
                    raise RefusedError(status, _words(text.decode("utf-8", "replace")))
            while data := await self._read(reader, may_pause=may_pause):
                yield data
        except TimeoutError as error:
            raise _hangs(f"the Docker engine's {path}", self._call_seconds) from error
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            raise UnavailableError(
                f"the Docker engine broke off {path}: {_short(error)}", reason=ENGINE_DOWN
            ) from error
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, *, may_pause: bool) -> bytes:
        async with asyncio.timeout(None if may_pause else self._call_seconds):
            return await reader.read(_RAW_BYTES)

    def engine_began(self) -> float:
        """When the engine was started, in seconds since the epoch: its process, or where another
        one listens in its place, that one or the machine. May block for a moment. Raises UnavailableError."""
        with _connected(self.host, self._call_seconds) as probe:
            size = struct.calcsize("3i")
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid = struct.unpack("3i", peer)[0]
        stat = read_stat(pid) if pid > 1 else None
        ticks = stat.start_ticks / os.sysconf("SC_CLK_TCK") if stat is not None else 0.0
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks

    async def close(self) -> None:
        """Let go of all connections."""
        self._calls.close()
        self._starts.close()
        for api in self._apis.values():
            api.close()
        await self._http.aclose()

    # -- inner parts -----------------------------------------------------------------------------

    async def _call(
        self,
        lane: Lane,
        seconds: float,
        extra_seconds: float,
        method: str,
        args: Any,
        kwargs: Mapping[str, Any],
    ) -> Any:
        while True:
            api = await self._api(seconds)
            limit = seconds + extra_seconds
            call = functools.partial(
                _translated, self.host, getattr(api, method), method, args, kwargs, limit
            )
            what = f"the Docker engine's {method}"
            try:
                return await lane.run(call, what, limit + _SPARE_SECONDS)
            except RefusedError as error:
                if not error.is_version:
                    raise
                if await self._version_anew(api, seconds) == api.api_version:
                    raise

    async def _version_anew(self, old: docker.APIClient, seconds: float) -> str:
        """What version to speak with an engine that speaks the old one no more: it was replaced by a
        newer or an older one while this process lived."""
        if self._apis.get(seconds) is old:
            self._version = ""
            for api in self._apis.values():
                api.close()
            self._apis.clear()
        return str((await self._api(seconds)).api_version)

    async def _api(self, seconds: float) -> docker.APIClient:
        """A client whose own time limit is `seconds`: docker-py has one for each client."""
        found = self._apis.get(seconds)
        if found is not None:
            return found
        async with self._connecting:
            if seconds not in self._apis:
                make = functools.partial(_connect, self.host, self._version, seconds)
                limit = seconds + _SPARE_SECONDS
                api = await self._calls.run(make, "connecting to the Docker engine", limit)
                self._version = api.api_version
                self._apis[seconds] = api
            return self._apis[seconds]


def _connect(host: str, version: str, seconds: float) -> docker.APIClient:
    _check_listens(host, seconds)
    try:
        if not version:
            any_version = docker.constants.DEFAULT_DOCKER_API_VERSION
            with contextlib.closing(_client(host, any_version, seconds)) as api:
                version = api.version(api_version=False)["ApiVersion"]
        return _client(host, version, seconds)
    except (docker.errors.DockerException, requests.RequestException, OSError) as error:
        raise UnavailableError(
            f"no Docker engine answers at {host}: {_short(error)}", reason=ENGINE_DOWN
        ) from error
    except (KeyError, ValueError) as error:
        message = f"what answers at {host} is no Docker engine: it tells no version of its API"
        raise UnavailableError(message, reason=ENGINE_DOWN) from error


def _client(host: str, version: str, seconds: float) -> docker.APIClient:
    api = docker.APIClient(host, version, timeout=int(seconds))
    api.mount("http+docker://", _Adapter(host, int(seconds)))
    api.trust_env = False  # no proxies, no .netrc: it is a socket of this machine
    return api


class _Adapter(unixconn.UnixHTTPAdapter):
    """docker-py's way to the engine, with connections of ours."""

    def __init__(self, host: str, timeout: int) -> None:
        super().__init__(f"http+{host}", timeout, max_pool_size=_CALL_THREADS)

    def get_connection(self, url: Any, proxies: Any = None) -> "_Pool":
        """The connections for a URL."""
        with self.pools.lock:
            pool: _Pool | None = self.pools.get(url)
            if pool is None:
                pool = _Pool(url, self.socket_path, self.timeout, maxsize=self.max_pool_size)
                self.pools[url] = pool
            return pool


class _Pool(unixconn.UnixHTTPConnectionPool):
    def _new_conn(self) -> Any:
        return _Connection(self.base_url, self.socket_path, cast(int, self.timeout))


class _Connection(unixconn.UnixHTTPConnection):
    """Closes its socket also if nobody listens; docker-py leaves it to the garbage collector."""

    def connect(self) -> None:
        """Open the socket. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(self.unix_socket)
        except OSError:
            sock.close()
            raise
        self.sock = sock


def _check_listens(host: str, seconds: float) -> None:
    """Raises UnavailableError if nobody listens, in words that docker-py does not find."""
    with _connected(host, seconds):
        pass


@contextlib.contextmanager
def _connected(host: str, seconds: float) -> Iterator[socket.socket]:
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(seconds)
            probe.connect(socket_path(host))
            yield probe
    except OSError as error:
        why = error.strerror or str(error)
        raise UnavailableError(
            f"no Docker engine answers at {host}: {why}", reason=ENGINE_DOWN
        ) from error


def _translated(
    host: str,
    call: Callable[..., T],
    method: str,
    args: Any,
    kwargs: Mapping[str, Any],
    seconds: float,
) -> T:
    _check_listens(host, seconds)
    try:
        return call(*args, **kwargs)
    except docker.errors.APIError as error:
        words = str(error.explanation or error)
        raise RefusedError(int(error.status_code or 500), _words(words)) from error
    except requests.exceptions.Timeout as error:
        raise _hangs(f"the Docker engine's {method}", seconds) from error
    except (requests.exceptions.RequestException, OSError) as error:
        if "timed out" in str(error):  # as urllib3 words a read that took too long
            raise _hangs(f"the Docker engine's {method}", seconds) from error
        raise UnavailableError(
            f"the Docker engine cannot be reached: {_short(error)}", reason=ENGINE_DOWN
        ) from error
    except ValueError as error:  # an answer that is no JSON
        message = f"the Docker engine's answer to {method} cannot be read: {_short(error)}"
        raise UnavailableError(message, reason=ENGINE_DOWN) from error


async def lines(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream, one a line. What is no JSON is left out."""
    rest = b""
    async for data in response.aiter_bytes():
        *whole, rest = (rest + data).split(b"\n")
        if len(rest) > _LINE_BYTES_MAX:
            raise UnavailableError("the Docker engine sent a line without end", reason=ENGINE_DOWN)
        for line in whole:
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def _hangs(what: str, seconds: float) -> BacalhauError:
    return UnavailableError(f"{what} did not return within {seconds:.0f} s", reason=ENGINE_FAULT)


def _words(text: str) -> str:
    """The engine's message, out of its JSON if it is in one."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        if isinstance(found, dict) and "message" in found:
            text = str(found["message"])
    return text.strip()[:1024] or "no reason given"


def _short(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:300]
