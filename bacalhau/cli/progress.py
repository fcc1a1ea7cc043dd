"""Waiting for a job while somebody watches: one live line on a terminal, plain lines elsewhere."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from bacalhau.cli import exits
from bacalhau.cli.text import clean, clean_lines, duration, now
from bacalhau.client.sync import Client
from bacalhau.client.waiting import Goal, Waited
from bacalhau_api.errors import BacalhauError, TransientError
from bacalhau_api.v1.execution import Execution
from bacalhau_api.v1.job import Job, JobPhase

if TYPE_CHECKING:
    from rich.status import Status

TAIL_LINES: Final = 10


def wait_for_job(client: Client, job: Job, goal: Goal, timeout_seconds: float | None) -> int:
    """Wait, show how it goes on stderr, and return the exit code.

    Raises WaitTimeoutError, KeyboardInterrupt.
    """
    began = now()
    waited = watched(client, job, goal, timeout_seconds)
    if waited.is_reached:
        print(f"job/{clean(job.name)} {goal} ({duration(now() - began)})", flush=True)
        return exits.OK
    show_failure(client, waited.job)
    return exits.JOB_FAILED


def watched(
    client: Client, job: Job, goal: Goal, timeout_seconds: float | None, *, is_quiet: bool = False
) -> Waited:
    """Wait, and show how it goes on stderr, unless quiet.

    Raises WaitTimeoutError. Ctrl-C leaves the job running, says how to come back, and goes on as
    KeyboardInterrupt.
    """
    with ExitStack() as stack:
        line = None if is_quiet else _Line(stack)

        def show(text: str) -> None:
            if line is not None:
                line.show(text)

        told = Told(show)
        try:
            return client.wait(
                job.name,
                job.ref.namespace,
                goal=goal,
                timeout_seconds=timeout_seconds,
                generation=job.metadata.generation,
                revision=job.metadata.resource_version,
                on_update=told.job,
                on_execution=told.execution,
                on_lost=lambda: told.lost(client.server),
            )
        except KeyboardInterrupt:
            if line is not None:
                line.clear()
            name, where = clean(job.name), back_to(job)
            exits.note(
                f"the job goes on; come back with: bacalhau wait {name}{where}"
                f" (stop it with: bacalhau stop {name}{where})"
            )
            raise


def back_to(job: Job) -> str:
    """What has to be added to a command for it to find the job's namespace."""
    return "" if job.ref.namespace == "default" else f" -n {clean(job.ref.namespace)}"


def show_failure(client: Client, job: Job, *, with_tail: bool = True) -> None:
    """Why a job ended badly, with the last lines that a failed execution wrote to stderr."""
    status, where = job.status, back_to(job)
    why = clean(status.message or status.reason)
    if with_tail and status.phase is JobPhase.FAILED:
        for line in _last_words(client, job):
            exits.note(line)
    exits.tell(
        BacalhauError(
            f"job {job.name} is {status.phase}{f': {why}' if why else ''}",
            hint=f"bacalhau explain job {job.name}{where}; bacalhau logs {job.name}{where}",
        )
    )


def _last_words(client: Client, job: Job) -> list[str]:
    fields = f"job={job.name},phase=Failed"
    try:
        failed = client.list(Execution, namespace=job.ref.namespace, fields=fields, sort="-created")
        for execution in failed:
            spec, report = execution.spec, execution.status.report
            is_mine = spec.job_uid == job.metadata.uid
            if not is_mine or spec.slot.generation != job.metadata.generation or report is None:
                continue
            tail = clean_lines(report.stderr_tail or report.stdout_tail).rstrip().splitlines()
            if tail:
                return [f"[{execution.name}] {line}" for line in tail[-TAIL_LINES:]]
    except TransientError:  # an extra: what happened is told without it
        pass
    return []


def summary(job: Job) -> str:
    """A job's state in one line."""
    status, counts = job.status, job.status.slots
    if not job.is_observed:
        return f"job/{job.name} Pending"
    parts = [f"job/{job.name} {status.phase}"]
    if counts.total:
        parts.append(f"{counts.succeeded}/{counts.total} done")
    if counts.running:
        parts.append(f"{counts.running} running")
    if counts.failed:
        parts.append(f"{counts.failed} failed")
    # What runs is waited for anyway; only what keeps more from running is news.
    if status.waiting is not None and not counts.running:
        parts.append(f"waiting: {status.waiting.message or status.waiting.what}")
    return clean(", ".join(parts))


class Told:
    """Passes on what is new of a job, and of one of its executions until that runs."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._summary = ""
        self._name = ""
        self._words = ""

    def job(self, job: Job) -> None:
        """It was looked at."""
        if (text := summary(job)) != self._summary:
            self._summary = text
            self._show(text)

    def lost(self, server: str) -> None:
        """The server does not answer; when it does again, that is news."""
        self._summary = self._words = ""
        self._show(f"{server} does not answer; trying again")

    def execution(self, execution: Execution) -> None:
        """It does not run yet."""
        self._name = self._name or execution.name
        text = preparing(execution)
        if execution.name == self._name and text != self._words:
            self._words = text
            self._show(text)


def preparing(execution: Execution) -> str:
    """What keeps an execution from running, in one line."""
    waiting = execution.status.report.waiting if execution.status.report else None
    words = f": {waiting.message or waiting.what}" if waiting is not None else ""
    return clean(f"{execution.name} {execution.phase}{words}")


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
