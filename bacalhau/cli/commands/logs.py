"""`logs`: output of executions, live or afterwards."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Final, Literal, cast

import typer

from bacalhau.cli import exits
from bacalhau.cli.completing import complete_jobs
from bacalhau.cli.options import Namespace, check_choice, session_of
from bacalhau.cli.printer import LogPrinter
from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau.client.sync import Client
    from bacalhau.replies import LogRecord
    from bacalhau_api.v1.execution import Execution
    from bacalhau_api.v1.job import Job


NODE_AWAY: Final = "NodeAway"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def logs(
        context: typer.Context,
        name: Annotated[
            str, typer.Argument(metavar="JOB | EXECUTION | KIND/NAME", autocompletion=complete_jobs)
        ],
        follow: Annotated[
            bool, typer.Option("--follow", "-f", help="Go on until the end.")
        ] = False,
        tail: Annotated[
            int | None, typer.Option("--tail", "-t", min=0, help="Only the last so many lines.")
        ] = None,
        stream: Annotated[str, typer.Option(help="stdout, stderr or all.")] = "all",
        prefix: Annotated[
            bool | None,
            typer.Option(
                "--prefix/--no-prefix",
                help="Say in front of lines where they are from. "
                "Default: if the job has several slots.",
            ),
        ] = None,
        raw: Annotated[
            bool, typer.Option("--raw", help="Also send control characters to a terminal.")
        ] = False,
        namespace: Namespace = "default",
    ) -> int:
        """Print the output of a job's executions, or of one execution.

        What the workload wrote to stderr goes to stderr. The exit code is 6 if a node is away, so
        that a log of the job is missing, and nothing is followed.
        """
        check_choice(stream, ("stdout", "stderr", "all"), "--stream")
        wanted = cast(Literal["stdout", "stderr", "all"], stream)
        session = session_of(context)
        with session.client() as client:
            of: Job | Execution | None = None
            if session.is_local:
                source, is_many = _here(client, name, namespace)
            else:
                of = _find(client, name, namespace)
                source, is_many = partial(client.logs, of), _has_slots(of)
            printer = LogPrinter(with_prefix=is_many if prefix is None else prefix, is_raw=raw)
            if follow:
                _say_why_nothing(of)
            is_missing = False
            try:
                for record in source(follow=follow, tail=tail, stream=wanted):
                    printer.show(record)
                    is_missing = is_missing or record.reason == NODE_AWAY
            except KeyboardInterrupt:
                if follow:
                    printer.finish()
                    again = f"come back with: bacalhau logs -f {clean(name)}"
                    again += " --local" if session.is_local else ""
                    exits.note(f"the job goes on; {again}")
                return exits.INTERRUPTED
            printer.finish()
            if not printer.has_shown and not follow:
                _say_why_nothing(of)
        return exits.UNAVAILABLE if is_missing and not follow else exits.OK


def _find(client: "Client", word: str, namespace: str) -> "Job | Execution":
    from bacalhau.cli.targets import parse_named
    from bacalhau.kinds import EXECUTION, JOB
    from bacalhau_api.errors import InvalidError, NotFoundError, Problem
    from bacalhau_api.v1.execution import Execution
    from bacalhau_api.v1.job import Job

    if "/" in word:
        (target,) = parse_named([word])
        if target.kind == JOB:
            return client.get(Job, target.name, namespace)
        if target.kind == EXECUTION:
            return client.get(Execution, target.name, namespace)
        raise InvalidError([Problem(repr(word), "has no logs", hint="name a job or an execution")])
    try:
        return client.get(Job, word, namespace)
    except NotFoundError:
        try:
            return client.get(Execution, word, namespace)
        except NotFoundError:
            message = f"there is no job or execution {word} in namespace {namespace}"
            hint = f"see: bacalhau get jobs; what there was: bacalhau history job/{word}"
            raise NotFoundError(message, hint=hint) from None


def _here(
    client: "Client", word: str, namespace: str
) -> "tuple[Callable[..., Iterator[LogRecord]], bool]":
    """What is meant on this node, which has no Job objects: the executions of a job that are here,
    or one execution. Also whether there are several."""
    from bacalhau.cli.targets import parse_named
    from bacalhau.kinds import EXECUTION
    from bacalhau_api.errors import NotFoundError
    from bacalhau_api.v1.execution import Execution

    kind, name = None, word
    if "/" in word:
        (target,) = parse_named([word])
        kind, name = target.kind, target.name
    if kind != EXECUTION:
        here = list(client.list(Execution, namespace=namespace, fields=f"job={name}"))
        if here:
            return partial(client.job_logs, name, namespace), len(here) > 1
    try:
        return partial(client.logs, client.get(Execution, name, namespace)), False
    except NotFoundError:
        message = f"nothing of {name} in namespace {namespace} is on this node"
        raise NotFoundError(message, hint="see: bacalhau get executions --local -A") from None


def _say_why_nothing(of: "Job | Execution | None") -> None:
    """Of a job that has not begun, what it waits for: an empty screen tells nobody."""
    from bacalhau.cli.progress import back_to, summary
    from bacalhau_api.v1.job import Job, JobPhase

    if isinstance(of, Job) and of.status.phase in (JobPhase.PENDING, JobPhase.QUEUED):
        exits.note(f"{summary(of)} (bacalhau explain job {of.name}{back_to(of)})")


def _has_slots(of: "Job | Execution") -> bool:
    from bacalhau_api.v1.job import Job

    return isinstance(of, Job) and (of.spec.count > 1 or of.spec.type.is_per_node)
