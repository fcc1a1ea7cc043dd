"""Waiting for a job while somebody watches: one live line on a terminal, plain lines elsewhere."""

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from bacalhau.cli import exits
from bacalhau.cli.text import clean, duration, now
from bacalhau.client.sync import Client
from bacalhau.client.waiting import Goal
from bacalhau_api.errors import BacalhauError
from bacalhau_api.v1.job import Job

if TYPE_CHECKING:
    from rich.status import Status


def wait_for_job(client: Client, job: Job, goal: Goal, timeout_seconds: float | None) -> int:
    """Wait, show how it goes on stderr, and return the exit code.

    Raises WaitTimeoutError. Ctrl-C leaves the job running and says how to come back.
    """
    began = now()
    with ExitStack() as stack:
        line = _Line(stack)
        try:
            waited = client.wait(
                job.name,
                job.ref.namespace,
                goal=goal,
                timeout_seconds=timeout_seconds,
                generation=job.metadata.generation,
                on_update=lambda seen: line.show(summary(seen)),
            )
        except KeyboardInterrupt:
            line.clear()
            where = "" if job.ref.namespace == "default" else f" -n {clean(job.ref.namespace)}"
            exits.note(
                f"the job goes on; come back with: bacalhau wait {clean(job.name)}{where}"
                f" (stop it with: bacalhau stop {clean(job.name)}{where})"
            )
            return exits.INTERRUPTED
    took = duration(now() - began)
    status = waited.job.status
    if waited.is_reached:
        print(f"job/{clean(job.name)} {goal} ({took})")
        return exits.OK
    why = clean(status.message or status.reason)
    exits.tell(
        BacalhauError(
            f"job {job.name} is {status.phase}{f': {why}' if why else ''}",
            hint=f"bacalhau explain job {job.name}; bacalhau logs {job.name}",
        )
    )
    return exits.JOB_FAILED


def summary(job: Job) -> str:
    """A job's state in one line."""
    status, counts = job.status, job.status.slots
    if status.observed_generation < job.metadata.generation:
        return f"job/{job.name} Pending"
    parts = [f"job/{job.name} {status.phase}"]
    if counts.total:
        parts.append(f"{counts.succeeded}/{counts.total} done")
    if counts.running:
        parts.append(f"{counts.running} running")
    if counts.failed:
        parts.append(f"{counts.failed} failed")
    if status.waiting is not None:
        parts.append(f"waiting: {status.waiting.message or status.waiting.what}")
    return clean(", ".join(parts))


class _Line:
    """The newest state, shown once each."""

    def __init__(self, stack: ExitStack) -> None:
        self._last = ""
        self._status: Status | None = None
        if sys.stderr.isatty():
            from rich.console import Console

            console = Console(stderr=True, highlight=False, markup=False)
            self._status = stack.enter_context(console.status("waiting"))

    def show(self, text: str) -> None:
        """A new state."""
        if text == self._last:
            return
        self._last = text
        if self._status is None:
            print(text, file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self._status.update(Text(text))

    def clear(self) -> None:
        """Stop being live, so that what follows stands on a line of its own."""
        if self._status is not None:
            self._status.stop()
