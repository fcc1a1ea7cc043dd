"""`apply`: files to objects."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bacalhau.cli import exits
from bacalhau.cli.options import Namespace, Timeout, session_of
from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau.client.sync import Client
    from bacalhau_api.jobfile import Document
    from bacalhau_api.v1.job import Job


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def apply(
        context: typer.Context,
        file: Annotated[
            list[Path],
            typer.Option("--file", "-f", help="A file, a directory, or - for standard input."),
        ],
        recursive: Annotated[
            bool, typer.Option("--recursive", "-R", help="Directories within directories, too.")
        ] = False,
        namespace: Namespace = "default",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Ask the server what would happen.")
        ] = False,
        wait: Annotated[bool, typer.Option("--wait", help="Wait until jobs are complete.")] = False,
        timeout: Timeout = None,
    ) -> int:
        """Create what files declare, or change it to that.

        Everything is read and checked before anything is sent. Applying what is there already
        changes nothing.
        """
        from bacalhau.cli.files import read_documents
        from bacalhau_api.errors import BacalhauError, InvalidError, Problem, UnavailableError

        documents = read_documents(file, recursive=recursive, namespace=namespace)
        if not documents:
            raise InvalidError([Problem("-f", "holds no objects")])
        code = exits.OK
        jobs: list[Job] = []
        with session_of(context).client() as client:
            for document in documents:
                try:
                    job = _apply(client, document, dry_run=dry_run)
                except UnavailableError:
                    raise
                except BacalhauError as error:
                    exits.note(f"{document.source}: {document.resource.ref}:")
                    exits.tell(error)
                    code = code or exits.code_of(error)
                else:
                    jobs += [job] if job else []
            if wait and not dry_run:
                code = code or _wait(client, jobs, timeout)
        return code


def _apply(client: "Client", document: "Document", *, dry_run: bool) -> "Job | None":
    from bacalhau_api.v1.job import Job
    from bacalhau_api.v1.node import Node

    item = document.resource
    suffix = " (dry run)" if dry_run else ""
    for warning in document.warnings:
        exits.warn(f"{document.source}: {warning}")
    if isinstance(item, Node):
        done = client.apply_node(item, dry_run=dry_run)
        print(f"node/{clean(item.name)} {clean(done.outcome)}{suffix}")
        return None
    assert isinstance(item, Job), "only jobs and nodes can be applied"
    if item.name:
        applied = client.apply(item, dry_run=dry_run)
    else:
        applied = client.create(item, item.ref.namespace)
    for warning in applied.warnings:
        if warning not in document.warnings:
            exits.warn(warning)
    print(f"job/{clean(applied.job.name)} {clean(applied.outcome)}{suffix}", flush=True)
    return applied.job


def _wait(client: "Client", jobs: "list[Job]", timeout: float | None) -> int:
    from bacalhau.cli.progress import wait_for_job

    code = exits.OK
    deadline = None if timeout is None else _monotonic() + timeout
    for job in jobs:
        # A service or daemon never completes; it is there when it runs.
        goal = "complete" if job.spec.type.runs_to_completion else "running"
        left = None if deadline is None else max(0.0, deadline - _monotonic())
        result = wait_for_job(client, job, "complete" if goal == "complete" else "running", left)
        if result == exits.INTERRUPTED:
            return result
        code = code or result
    return code


def _monotonic() -> float:
    import time

    return time.monotonic()
