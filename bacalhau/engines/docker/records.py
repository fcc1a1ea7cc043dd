"""What the node keeps of each run beside the engine: small JSON files in a directory of its own.

    run.json   written before the container is made: which run, where its log goes
    started    made once the engine has started it: when that was
    stop.json  written before we end it: why and when
    end.json   written once it has ended, and all that it wrote is on the disk: the observation, for
               ever

The engine says whether a container runs; these say what it was for, and what is known for good. The
first and the last are on the disk once they are written, whatever happens to the power.
"""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bacalhau.flush import fsync_path
from bacalhau_controllers.runner.ports import Observation, RunPhase
from bacalhau_controllers.runner.state import Instant

RUN, STARTED, STOP, END = "run.json", "started", "stop.json", "end.json"


@dataclass(frozen=True, slots=True)
class Record:
    """One run. `stdout_at` and `stderr_at` are the sizes of the streams' files at its start: what
    follows is this run's. `network` is a network of its own, if it has one. `leash_*` as in
    `Leash`; `leash_noted` is empty without one."""

    run: str
    stdout: str
    stderr: str
    log_index: str
    output_bytes_max: int
    stdout_at: int = 0
    stderr_at: int = 0
    timeout_seconds: float | None = None
    image: str = ""
    network: str = ""
    ports: tuple[tuple[str, int, int, str], ...] = ()
    domains: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    leash_noted: str = ""
    leash_seconds: float = 0.0
    leash_contact: float = 0.0
    leash_boot: str = ""


@dataclass(frozen=True, slots=True)
class Stop:
    """Why we ended a run; `at` is in seconds since the epoch."""

    reason: str
    message: str
    at: float


@dataclass(slots=True)
class Shelf:
    """All records, under `root`."""

    root: Path
    _ends: dict[str, Observation] = field(default_factory=dict)

    def open(self) -> None:
        """Make the directory."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def names(self) -> list[str]:
        """The runs that have a record."""
        return [entry.name for entry in os.scandir(self.root) if entry.is_dir()]

    def write(self, record: Record) -> None:
        """Before the container is made. May block for a moment, as `write_end` may."""
        directory = self.root / record.run
        directory.mkdir(exist_ok=True, mode=0o700)
        _write(directory / RUN, asdict(record), is_durable=True)
        fsync_path(self.root)

    def read(self, run: str) -> Record | None:
        """None if there is none, or none that can be read."""
        data = _read(self.root / run / RUN)
        if data is None:
            return None
        try:
            data["ports"] = tuple((str(n), int(h), int(c), str(i)) for n, h, c, i in data["ports"])
            data["domains"], data["gpus"] = tuple(data["domains"]), tuple(data["gpus"])
            return Record(**data)
        except (KeyError, TypeError, ValueError):
            return None

    def mark_started(self, run: str, at: Instant) -> None:
        """From now on a container that is not there has vanished."""
        path = self.root / run / STARTED
        path.touch()
        with contextlib.suppress(OSError):  # on a full disk too it has been started
            path.write_text(at.model_dump_json(), encoding="utf-8")

    def was_started(self, run: str) -> bool:
        """Whether the engine ever took it."""
        return (self.root / run / STARTED).exists()

    def started_at(self, run: str) -> Instant | None:
        """When the engine had started it; None if that is not known."""
        try:
            return Instant.model_validate_json((self.root / run / STARTED).read_bytes())
        except (OSError, ValueError):
            return None

    def mark_stop(self, run: str, stop: Stop) -> None:
        """Why the run is being ended; the first reason stands."""
        path = self.root / run / STOP
        if path.parent.is_dir() and not path.exists():
            with contextlib.suppress(OSError):  # on a full disk too it is to end
                data = {"reason": stop.reason, "message": stop.message, "at": stop.at}
                _write(path, data, is_durable=False)

    def stop_of(self, run: str) -> Stop | None:
        """Our own stop, if there was one."""
        data = _read(self.root / run / STOP)
        if data is None:
            return None
        try:
            return Stop(str(data["reason"]), str(data["message"]), float(data["at"]))
        except (KeyError, TypeError, ValueError):
            return Stop("Killed", "", 0.0)

    def write_end(self, run: str, end: Observation) -> None:
        """How it ended, for good: the first word stands."""
        if self.end_of(run) is not None:
            return
        directory = self.root / run
        directory.mkdir(exist_ok=True, mode=0o700)
        data = asdict(end) | {
            "started_at": end.started_at.isoformat() if end.started_at else None,
            "finished_at": end.finished_at.isoformat() if end.finished_at else None,
        }
        _write(directory / END, data, is_durable=True)
        self._ends[run] = end

    def remember_end(self, run: str, end: Observation) -> None:
        """Its end, if it cannot be written down: for as long as this process lives."""
        self._ends.setdefault(run, end)

    def has_end(self, run: str) -> bool:
        """Whether its end is written down, asked anew: another process may have done so."""
        return (self.root / run / END).exists()

    def end_of(self, run: str) -> Observation | None:
        """None while it has not ended, or its log is not complete."""
        found = self._ends.get(run)
        if found is not None:
            return found
        data = _read(self.root / run / END)
        if data is None:
            return None
        try:
            end = Observation(
                phase=RunPhase(data.pop("phase")),
                started_at=_moment(data.pop("started_at")),
                finished_at=_moment(data.pop("finished_at")),
                **data,
            )
        except (KeyError, TypeError, ValueError):
            return None
        self._ends[run] = end
        return end

    def remove(self, run: str) -> None:
        """Forget it."""
        self._ends.pop(run, None)
        shutil.rmtree(self.root / run, ignore_errors=True)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _write(path: Path, data: dict[str, Any], *, is_durable: bool) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(data), encoding="utf-8")
    if is_durable:
        fsync_path(fresh)
    os.replace(fresh, path)
    if is_durable:
        fsync_path(path.parent)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
