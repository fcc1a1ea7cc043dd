"""`wait`."""

from typing import Annotated, cast

import typer

from bacalhau.cli.options import JobArgument, Namespace, Timeout, check_choice, session_of
from bacalhau.cli.targets import job_name


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def wait(
        context: typer.Context,
        job: JobArgument,
        goal: Annotated[
            str, typer.Option("--for", help="complete, delivered or running.")
        ] = "complete",
        timeout: Timeout = None,
        namespace: Namespace = "default",
    ) -> int:
        """Wait for a job. Exit code 3 if it failed or was stopped, 4 if the time is over."""
        from bacalhau.cli.progress import wait_for_job
        from bacalhau.client.waiting import Goal
        from bacalhau_api.v1.job import Job

        check_choice(goal, ("complete", "delivered", "running"), "--for")
        with session_of(context).client() as client:
            found = client.get(Job, job_name(job), namespace)
            return wait_for_job(client, found, cast(Goal, goal), timeout)
