"""What `docker run` and `wasm run` do with their job: print it, or send it and see it through."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bacalhau.cli import exits
from bacalhau.cli.running.flags import RunFlags
from bacalhau.cli.session import Session, print_yaml
from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau.client.sync import Client
    from bacalhau_api.v1.job import Job

Build = Callable[[str], "Job"]
"""Makes the job, of a suffix for its name."""


def run_job(session: Session, flags: RunFlags, build: Build) -> int:
    """Build the job, submit it, and wait, follow or download as asked; the exit code.

    Of a job with one slot that failed, the exit code is that of its process.
    """
    from bacalhau.system import SystemIds

    _check(flags)
    uid = SystemIds().uid()
    job = build(uid[:6])
    if flags.dry_run:
        from bacalhau_api.jobfile import to_document

        print_yaml(to_document(job))
        return exits.OK
    with _reached(session, flags).client() as client:
        return _submitted(client, _submit(client, job, flags, nonce=uid[6:18]), flags)


def environment() -> dict[str, str]:
    """The caller's variables, for `-e NAME`."""
    return dict(os.environ)


def _check(flags: RunFlags) -> None:
    if flags.download and not (flags.wait or flags.follow):
        raise exits.usage("--download", "does not go with --no-wait", hint="leave one of them out")
    if flags.output_dir is not None and not flags.download:
        raise exits.usage("--output-dir", "is for --download", hint="add --download")
    if flags.id_only and flags.follow:
        raise exits.usage("--id-only", "does not go with --follow", hint="leave one of them out")
    for flag, is_given in (
        ("--node-details", flags.node_details),
        ("--group-events", flags.group_events),
    ):
        if is_given:
            exits.warn(f"{flag} has no effect here; see bacalhau describe job NAME afterwards")


def _reached(session: Session, flags: RunFlags) -> Session:
    """The session, where the server was named among the command's own flags."""
    if flags.server:
        return replace(session, server=flags.server)
    if not flags.api_host and not flags.api_port:
        return session
    from bacalhau.client.address import server_from

    given = {"BACALHAU_API_HOST": flags.api_host, "BACALHAU_API_PORT": flags.api_port}
    kept = {key: os.environ[key] for key in given if key in os.environ}
    return replace(
        session, server=server_from(kept | {key: value for key, value in given.items() if value})
    )


def _submit(client: "Client", job: "Job", flags: RunFlags, *, nonce: str) -> "Job":
    """Create the job. One of that name that has ended runs again; one that goes on is joined."""
    applied = client.apply(job)
    found, outcome = applied.job, clean(applied.outcome)
    if outcome != "created" and found.is_over and found.spec.type.runs_to_completion:
        found = client.rerun(found.name, found.ref.namespace, nonce=nonce)
        outcome = f"runs again as generation {found.metadata.generation}"
    else:
        for warning in applied.warnings:
            exits.warn(warning)
    if flags.id_only:
        print(clean(found.name), flush=True)
    elif flags.follow:
        exits.note(f"job/{found.name} {outcome}")
    else:
        print(f"job/{clean(found.name)} {outcome}", flush=True)
    return found


def _submitted(client: "Client", job: "Job", flags: RunFlags) -> int:
    from bacalhau.cli.progress import back_to, show_failure, watched
    from bacalhau.cli.running.build import whole_seconds

    if not flags.wait and not flags.follow:
        return exits.OK
    limit = float(whole_seconds(flags.wait_timeout)) if flags.wait_timeout else None
    lasts = not job.spec.type.runs_to_completion
    if flags.follow:
        _follow(client, job, limit)
    waited = watched(
        client,
        job,
        "running" if lasts else "complete",
        limit,
        is_quiet=flags.id_only or flags.follow,
    )
    if not waited.is_reached:
        show_failure(client, waited.job, with_tail=not flags.follow)
        return _process_exit_code(client, waited.job) or exits.JOB_FAILED
    if not flags.follow and not flags.id_only:
        print(f"job/{clean(job.name)} {'running' if lasts else 'complete'}", flush=True)
    if flags.download:
        return _download(client, waited.job, flags)
    if not flags.follow and not flags.id_only:
        _say_what_next(waited.job, back_to(job))
    return exits.OK


def _follow(client: "Client", job: "Job", limit: float | None) -> None:
    """Show the output to its end. What keeps it from starting is shown until it starts."""
    from bacalhau.cli.printer import LogPrinter
    from bacalhau.cli.progress import back_to, watched

    watched(client, job, "running", limit)
    printer = LogPrinter(with_prefix=job.spec.count > 1 or job.spec.type.is_per_node, is_raw=False)
    try:
        for record in client.logs(job, follow=True):
            printer.show(record)
    except KeyboardInterrupt:
        name, where = clean(job.name), back_to(job)
        exits.note(
            f"the job goes on; come back with: bacalhau logs -f {name}{where}"
            f" (stop it with: bacalhau stop {name}{where})"
        )
        raise
    finally:
        printer.finish()


def _process_exit_code(client: "Client", job: "Job") -> int | None:
    """The exit code of the last attempt of the only slot, unless it is 0 or there are several."""
    from bacalhau_api.v1.execution import Execution
    from bacalhau_api.v1.job import JobPhase

    # What a stopped program was killed with says nothing.
    has_failed = job.status.phase is JobPhase.FAILED
    if not has_failed or job.spec.type.is_per_node or job.spec.count != 1:
        return None
    fields = f"job={job.name}"
    executions = [
        execution
        for execution in client.list(Execution, namespace=job.ref.namespace, fields=fields)
        if execution.spec.job_uid == job.metadata.uid
        and execution.spec.slot.generation == job.metadata.generation
    ]
    last = max(executions, key=lambda execution: execution.spec.attempt, default=None)
    report = last.status.report if last else None
    return report.exit_code or None if report else None


def _download(client: "Client", job: "Job", flags: RunFlags) -> int:
    from bacalhau.cli.commands.download import default_name, download_job

    into = flags.output_dir or Path(default_name(job.name, job.ref.namespace))
    return download_job(client, job.name, job.ref.namespace, into, is_quiet=flags.id_only)


def _say_what_next(job: "Job", where: str) -> None:
    name = clean(job.name)
    exits.note(f"its output: bacalhau logs {name}{where}")
    if job.spec.task.result_paths and job.spec.type.runs_to_completion:
        exits.note(f"its results: bacalhau download {name}{where}")
