"""`bacalhau serve`: the parts of one process put together, started in order, stopped in reverse.

`orchestrator.py` is everything around the store, `compute.py` everything around the node agent.
"""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

from bacalhau.logs import set_up_logging
from bacalhau.nats.keys import write_private
from bacalhau.nats.process import DataLock
from bacalhau.remedies import remedy
from bacalhau.settings import ServeSettings
from bacalhau.system import SystemClock, SystemIds
from bacalhau_api.errors import BacalhauError, InvalidError, Problem, TerminalError
from bacalhau_api.meta import check_name

logger = logging.getLogger(__name__)

OPEN_FILES = 65536

NAME_FILE = "name"

LOCK_SECONDS = 3.0
"""For an earlier process on the same data to be gone, as in a restart."""

ADDRESS_FILE = "serve.json"
"""In the data directory while the process runs: its pid and, for an orchestrator, its addresses."""


def run(settings: ServeSettings) -> int:
    """Serve until SIGINT or SIGTERM; the exit code of the process. Raises BacalhauError if it
    cannot start."""
    set_up_logging(settings.log_level, settings.log_format)
    os.umask(0o077)
    _allow_open_files()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return asyncio.run(_serve(settings))
        except BaseExceptionGroup as group:
            raise _first(group) from group
    except OSError as error:
        raise _named(settings.data_dir, error) from error


def _allow_open_files() -> None:
    """Connections, followed logs and workloads need a few descriptors each; what a login shell allows
    is soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _PartFailedError(Exception):
    """The process ends for a failure. Raised so that its parts are closed as for one."""


async def _serve(settings: ServeSettings) -> int:
    clock, ids = SystemClock(), SystemIds()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    failures: list[BaseException] = []

    def fail(part: str, error: BaseException) -> None:
        _tell_failure(part, error)
        failures.append(error)
        stop.set()

    async with AsyncExitStack() as parts:
        parts.enter_context(contextlib.suppress(_PartFailedError))
        lock = DataLock(settings.data_dir / "serve.lock")
        await lock.take(LOCK_SECONDS)
        parts.callback(lock.release)
        enrolment = None
        address: dict[str, object] = {"pid": os.getpid()}
        if settings.is_orchestrator:
            from bacalhau.serve.orchestrator import Orchestrator

            orchestrator = Orchestrator(settings, clock, ids, fail)
            await parts.enter_async_context(orchestrator)
            enrolment = orchestrator.enrolment
            address |= {"api": orchestrator.api_url, "nats": orchestrator.nats_url}
        if settings.is_compute:
            from bacalhau.serve.compute import Compute

            name = node_name(settings)
            compute = Compute(settings, name, clock, ids, enrolment, fail)
            await parts.enter_async_context(compute)
            _keep_name(settings, name)
            address |= {"node": name}
        parts.enter_context(_announced(settings.data_dir / ADDRESS_FILE, address))
        logger.info("Bacalhau is ready", extra=address)
        await stop.wait()
        if failures:
            raise _PartFailedError
        logger.info("Stopping")
    return 1 if failures else 0


def _tell_failure(part: str, error: BaseException) -> None:
    """Where it is in the code is of use only where nobody foresaw it."""
    if isinstance(error, TerminalError):
        fields = {"part": part, "error": error.message, "hint": error.hint}
        logger.critical("Part of the process failed", extra=fields)
    else:
        logger.critical("Part of the process failed", extra={"part": part}, exc_info=error)


def node_name(settings: ServeSettings) -> str:
    """The node's name: as given, else as last time, else the host's."""
    name = settings.name or _kept_name(settings) or socket.gethostname().split(".")[0]
    try:
        check_name(name)
    except ValueError as error:
        problem = Problem("--name", str(error), repr(name)[:80])
        raise InvalidError([problem], hint="give the node a name: --name NAME") from error
    return name


def _kept_name(settings: ServeSettings) -> str:
    """Empty if there is none, or none that a power failure left."""
    kept = settings.data_dir / NAME_FILE
    return kept.read_text(errors="replace").strip("\0 \n") if kept.exists() else ""


def _keep_name(settings: ServeSettings, name: str) -> None:
    """A name that changes with the network would make a new node each time. Kept once the node runs
    under it: one that was refused is not to stand in the way of the right one."""
    try:
        if _kept_name(settings) != name:
            write_private(settings.data_dir / NAME_FILE, name + "\n")
    except OSError as error:
        logger.warning("Failed to keep the node's name", extra={"error": str(error), "node": name})


@contextlib.contextmanager
def _announced(path: Path, address: dict[str, object]):  # type: ignore[no-untyped-def]
    """Leave the addresses for scripts and tests, for as long as they are true. Where the disk is
    full nobody finds them there, but what runs goes on."""
    draft = path.with_suffix(".tmp")
    try:
        draft.write_text(json.dumps(address) + "\n")
        draft.replace(path)
    except OSError as error:
        logger.warning("Failed to leave the addresses", extra={"error": str(error), **address})
        _forget(path)  # those of an earlier process are not true any more
    try:
        yield
    finally:
        _forget(path)


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _named(data_dir: Path, error: OSError) -> Exception:
    """The error as one of `--data-dir`, if it is about a file in there or a directory on the way."""
    if not isinstance(error.filename, str):
        return error
    path = Path(error.filename)
    homes = (data_dir, Path(os.path.realpath(data_dir)))
    if not any(path.is_relative_to(home) or home.is_relative_to(path) for home in homes):
        return error
    where = "" if path in homes else f" at {path}"
    problem = Problem("--data-dir", f"cannot be used{where}: {error.strerror}", str(data_dir))
    return InvalidError([problem], hint=remedy(path, error))


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group, one of ours if there is one."""
    ours, others = group.split(BacalhauError)
    found: BaseException = ours or others or group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
