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
    from bacalhau_api.meta import Resource
    from bacalhau_api.provenance import Provenance
    from bacalhau_api.v1.job import Job


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def apply(
        context: typer.Context,
        file: Annotated[
            list[Path] | None,
            typer.Option("--file", "-f", help="A file, a directory, or - for standard input."),
        ] = None,
        recursive: Annotated[
            bool, typer.Option("--recursive", "-R", help="Directories within directories, too.")
        ] = False,
        namespace: Namespace = "default",
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Ask the server what would happen.")
        ] = False,
        plan: Annotated[
            str,
            typer.Option(
                help="Do what this plan says, all or nothing; refuse if the outcome would differ."
            ),
        ] = "",
        any_place: Annotated[
            bool, typer.Option("--any-place", help="Other nodes than planned are fine, too.")
        ] = False,
        message: Annotated[str, typer.Option("--message", "-m", help="Why, for the history.")] = "",
        wait: Annotated[bool, typer.Option("--wait", help="Wait until jobs are complete.")] = False,
        timeout: Timeout = None,
    ) -> int:
        """Create what files declare, or change it to that.

        Everything is read and checked before anything is sent. Applying what is there already
        changes nothing.
        """
        from bacalhau.cli.files import read_documents
        from bacalhau_api.errors import BacalhauError, InvalidError, Problem, UnavailableError

        if any_place and not plan:
            raise exits.usage("--any-place", "goes with --plan")
        if plan:
            if dry_run:
                raise exits.usage("--dry-run", "does not go with --plan: the plan was the dry run")
            return _apply_plan(
                context,
                file or [],
                plan,
                recursive=recursive,
                namespace=namespace,
                any_place=any_place,
                message=message,
                wait=wait,
                timeout=timeout,
            )
        if not file:
            raise exits.usage("-f", "is missing", hint="give a file, a directory, or - for stdin")
        documents = read_documents(file, recursive=recursive, namespace=namespace)
        if not documents:
            raise InvalidError([Problem("-f", "holds no objects")])
        # What is in a namespace is given its defaults when it is made.
        documents = sorted(documents, key=lambda d: d.resource.kind != "Namespace")
        code = exits.OK
        jobs: list[Job] = []
        with session_of(context).client() as client:
            for document in documents:
                try:
                    job = _apply(client, document, message, dry_run=dry_run)
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


def _apply_plan(
    context: typer.Context,
    files: list[Path],
    token: str,
    *,
    recursive: bool,
    namespace: str,
    any_place: bool,
    message: str,
    wait: bool,
    timeout: float | None,
) -> int:
    """Apply what was planned. Without files the server has to remember the plan."""
    from bacalhau.cli.commands.review import read_set
    from bacalhau.replies import SetRequest
    from bacalhau_api.v1.job import Job

    asked = SetRequest()
    if files:
        asked = read_set(files, recursive=recursive, namespace=namespace)
        asked = asked.but(provenance=asked.provenance.but(message=message))
    elif message:
        raise exits.usage("--message", "needs -f here: the plan itself is what is applied")
    asked = asked.but(token=token, any_place=any_place)
    with session_of(context).client() as client:
        done = client.apply_set(asked)
        jobs: list[Job] = []
        for item in done.objects:
            for warning in item.warnings:
                exits.warn(warning)
            print(f"{item.kind.lower()}/{clean(item.name)} {item.outcome}", flush=True)
            if wait and item.kind == "Job" and item.outcome in ("created", "configured"):
                jobs.append(client.get(Job, item.name, item.namespace))
        return _wait(client, jobs, timeout) if jobs else exits.OK


def _apply(client: "Client", document: "Document", message: str, *, dry_run: bool) -> "Job | None":
    from bacalhau.cli.origin import origin_of
    from bacalhau_api.v1.job import Job
    from bacalhau_api.v1.node import Node

    item = document.resource
    origin = origin_of(document.source, message)
    suffix = " (dry run)" if dry_run else ""
    for warning in document.warnings:
        exits.warn(f"{document.source}: {warning}")
    if isinstance(item, Node):
        done = client.apply_node(item, dry_run=dry_run, origin=origin)
        print(f"node/{clean(item.name)} {clean(done.outcome)}{suffix}")
        return None
    if not isinstance(item, Job):
        _apply_other(client, item, origin, dry_run=dry_run)
        return None
    if item.name:
        applied = client.apply(item, dry_run=dry_run, origin=origin)
    else:
        applied = client.create(item, item.ref.namespace)
    for warning in applied.warnings:
        if warning not in document.warnings:
            exits.warn(warning)
    print(f"job/{clean(applied.job.name)} {clean(applied.outcome)}{suffix}", flush=True)
    return applied.job


def _apply_other(
    client: "Client", item: "Resource", origin: "Provenance", *, dry_run: bool
) -> None:
    """Apply an object that has no route of its own, as a set of one."""
    from bacalhau.replies import DocumentText, SetRequest

    document = DocumentText(text=item.encode().decode(), source=origin.source)
    asked = SetRequest(documents=(document,), provenance=origin)
    label = f"{item.kind.lower()}/{clean(item.name)}"
    if dry_run:
        words = {"create": "created", "change": "configured", "none": "unchanged"}
        (planned,) = client.plan(asked).objects
        print(f"{label} {words.get(planned.action, planned.action)} (dry run)")
        return
    (done,) = client.apply_set(asked).objects
    print(f"{label} {done.outcome}")


def _wait(client: "Client", jobs: "list[Job]", timeout: float | None) -> int:
    from bacalhau.cli.progress import wait_for_job

    code = exits.OK
    deadline = None if timeout is None else _monotonic() + timeout
    for job in jobs:
        if not job.metadata.resource_version:  # it ended and was retired: there is none to wait for
            code = code or (exits.OK if job.status.phase == "Completed" else exits.JOB_FAILED)
            continue
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
