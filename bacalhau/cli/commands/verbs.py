"""Short commands about one job: `stop`, `rerun`, `suspend`, `resume`."""

from typing import Annotated

import typer

from bacalhau.cli.options import JobArgument, JobArguments, Namespace, Timeout, session_of
from bacalhau.cli.targets import job_name
from bacalhau.cli.text import clean


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(stop)
    app.command()(rerun)
    app.command()(suspend)
    app.command()(resume)


def stop(
    context: typer.Context,
    jobs: JobArguments,
    namespace: Namespace = "default",
    message: Annotated[str, typer.Option("--message", "-m", help="Why, for the history.")] = "",
) -> None:
    """Stop jobs; finished results are kept."""
    with session_of(context).client() as client:
        for name in map(job_name, jobs):
            job = client.stop(name, namespace, message=message)
            phase = job.status.phase
            is_over = phase.is_final and not job.is_stopped
            print(f"job/{clean(name)} {f'is over: {phase}' if is_over else 'stopping'}")


def rerun(
    context: typer.Context,
    job: JobArgument,
    namespace: Namespace = "default",
    nonce: Annotated[
        str, typer.Option(help="Any text: the same text runs it once, however often sent.")
    ] = "",
    failed: Annotated[
        bool,
        typer.Option(
            "--failed",
            help="Only the slots without a result, with the same inputs; results are kept.",
        ),
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is complete.")] = False,
    timeout: Timeout = None,
) -> int:
    """Run a job again as it is, as a new generation; with --failed, only what of it failed."""
    from bacalhau.cli.progress import wait_for_job

    name = job_name(job)
    with session_of(context).client() as client:
        again = client.rerun(name, namespace, nonce=nonce, failed=failed)
        if failed:
            counts = again.status.slots
            left = (
                f"{counts.total - counts.succeeded} of {counts.total} slots" if counts.total else ""
            )
            print(f"job/{clean(name)} runs {left or 'what failed of it'} again")
        else:
            print(f"job/{clean(name)} runs again as generation {again.metadata.generation}")
        if not wait:
            return 0
        return wait_for_job(client, again, "complete", timeout)


def suspend(context: typer.Context, jobs: JobArguments, namespace: Namespace = "default") -> None:
    """Start nothing more of these jobs until they are resumed."""
    with session_of(context).client() as client:
        for name in map(job_name, jobs):
            client.suspend(name, namespace)
            print(f"job/{clean(name)} suspended")


def resume(context: typer.Context, jobs: JobArguments, namespace: Namespace = "default") -> None:
    """Let suspended jobs go on."""
    with session_of(context).client() as client:
        for name in map(job_name, jobs):
            client.resume(name, namespace)
            print(f"job/{clean(name)} resumed")
