"""The files by which a run is known, whoever of agent, zygote and worker is alive.

Each is written once and never changed:

    run.json   by the worker, before any guest code: which process it is. Only the worker that
               created it goes on, so that a run that was asked for twice runs once.
    exit.json  by the worker at an end that it sees, else by the zygote: how it ended; on disk
               before anyone is told.
    over       by the worker, once no guest code runs any more: the end follows, as soon as what the
               guest wrote is on disk. It is not to be killed for being slow.
    stop.json  by the agent, before it kills: the end that follows was wanted.
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bacalhau.engines.processes import ProcessId
from bacalhau.flush import fsync_path

RUN = "run.json"
EXIT = "exit.json"
STOP = "stop.json"
OVER = "over"

MESSAGE_LENGTH_MAX = 2000

_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN})


@dataclass(frozen=True, slots=True)
class Started:
    """run.json. `time` in seconds since the epoch; `zygote` is the number of the parent."""

    process: ProcessId
    zygote: int
    time: float


@dataclass(frozen=True, slots=True)
class End:
    """exit.json. The fields mean what those of `Observation` do; `time` since the epoch."""

    exit_code: int | None
    time: float
    reason: str = ""
    message: str = ""
    is_system_fault: bool = False


def printable(text: str) -> str:
    """Text from a guest, made safe to print and bounded."""
    clean = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    if len(clean) > MESSAGE_LENGTH_MAX:
        clean = clean[:MESSAGE_LENGTH_MAX] + " [cut]"
    return clean


def write_started(directory: Path, started: Started) -> bool:
    """False if the run was started by another worker."""
    return _write_once(directory, RUN, asdict(started), is_durable=False)


def read_started(directory: Path) -> Started | None:
    """None if the run never began. A file that a power cut spoilt names no living process."""
    data = _read(directory / RUN)
    if data is None:
        return None
    try:
        return Started(ProcessId(**data["process"]), int(data["zygote"]), float(data["time"]))
    except (KeyError, TypeError, ValueError):
        return Started(ProcessId(0, 0, ""), 0, 0.0)


def write_end(directory: Path, end: End) -> bool:
    """Record an end, on disk when this returns. False if one was recorded: the first stands."""
    return _write_once(directory, EXIT, asdict(end), is_durable=True)


def read_end(directory: Path) -> End | None:
    """None if no end was recorded, or its record was spoilt: a broken disk cannot make a node hang
    on one run."""
    data = _read(directory / EXIT)
    return End(**data) if data else None  # written whole, see _write_once


def write_stop(directory: Path, time: float) -> bool:
    """Note that the run is about to be killed on purpose."""
    return _write_once(directory, STOP, {"time": time}, is_durable=False)


def was_stopped(directory: Path) -> bool:
    """True if somebody asked for the end."""
    return (directory / STOP).exists()


def stopped_end(time: float) -> End:
    """The end of a run that was killed because `stop` was called."""
    return End(exit_code=137, time=time, reason="Killed", message="stopped")


def leashed_end(time: float, seconds: float) -> End:
    """The end of a run whose node was cut off for too long."""
    text = f"the node was cut off for more than {seconds:g} s, after which it is to end"
    return End(exit_code=137, time=time, reason="Disconnected", message=text)


def _write_once(directory: Path, name: str, data: Mapping[str, Any], *, is_durable: bool) -> bool:
    temporary = directory / f".{name}.{os.getpid()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(json.dumps(data).encode())
        while rest:  # a disk that becomes full takes a part, and no error
            rest = rest[os.write(fd, rest) :]
        if is_durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    try:
        # A link, unlike a rename, fails where the name exists: that decides who was first.
        os.link(temporary, directory / name)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    if is_durable:
        fsync_path(directory)
    return True


def _read(path: Path) -> dict[str, Any] | None:
    """None if there is no such file, {} if it cannot be read as one. Raises OSError where another
    try may do better."""
    try:
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    except OSError as error:
        if error.errno in _PASSING:
            raise
        return {}
    return data if isinstance(data, dict) else {}
