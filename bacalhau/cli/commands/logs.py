"""`logs`: output of executions, live or afterwards."""

import sys
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from bacalhau.cli import exits
from bacalhau.cli.options import Namespace, check_choice, session_of
from bacalhau.cli.session import is_terminal
from bacalhau.cli.text import clean, clean_lines

if TYPE_CHECKING:
    from bacalhau.client.sync import Client
    from bacalhau.replies import LogRecord
    from bacalhau_api.v1.execution import Execution
    from bacalhau_api.v1.job import Job


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def logs(
        context: typer.Context,
        name: Annotated[str, typer.Argument(metavar="JOB | EXECUTION | KIND/NAME")],
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

        What the workload wrote to stderr goes to stderr.
        """
        check_choice(stream, ("stdout", "stderr", "all"), "--stream")
        wanted = cast(Literal["stdout", "stderr", "all"], stream)
        with session_of(context).client() as client:
            of = _find(client, name, namespace)
            printer = _Printer(
                with_prefix=prefix if prefix is not None else _has_slots(of), is_raw=raw
            )
            try:
                for record in client.logs(of, follow=follow, tail=tail, stream=wanted):
                    printer.show(record)
            except KeyboardInterrupt:
                if follow:
                    printer.finish()
                    again = f"come back with: bacalhau logs -f {clean(name)}"
                    exits.note(f"the job goes on; {again}")
                return exits.INTERRUPTED
            printer.finish()
        return exits.OK


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
            raise NotFoundError(message, hint="see: bacalhau get jobs") from None


def _has_slots(of: "Job | Execution") -> bool:
    from bacalhau_api.v1.job import Job

    return isinstance(of, Job) and (of.spec.count > 1 or of.spec.type.is_per_node)


class _Printer:
    """Writes records. With prefixes, only whole lines, so that those of several executions do not
    run into each other."""

    def __init__(self, *, with_prefix: bool, is_raw: bool) -> None:
        self._with_prefix = with_prefix
        self._is_raw = {
            "stdout": is_raw or not is_terminal(),
            "stderr": is_raw or not sys.stderr.isatty(),
        }
        self._rests: dict[tuple[str, str], str] = {}
        self._slots: dict[str, str] = {}

    def show(self, record: "LogRecord") -> None:
        """One record."""
        if record.notice:
            exits.note(f"[{record.execution}] {record.notice}")
        if not record.text:
            return
        self._slots[record.execution] = record.slot
        if not self._with_prefix:
            self._write(record.stream, record.text)
            return
        key = (record.execution, record.stream)
        *lines, rest = (self._rests.pop(key, "") + record.text).split("\n")
        if rest:
            self._rests[key] = rest
        for line in lines:
            self._write(record.stream, f"{self._prefix(record.execution)}{line}\n")

    def finish(self) -> None:
        """Write lines that had no end."""
        for (execution, stream), rest in self._rests.items():
            self._write(stream, f"{self._prefix(execution)}{rest}\n")
        self._rests.clear()

    def _prefix(self, execution: str) -> str:
        return f"[{clean(self._slots.get(execution, ''))}] "

    def _write(self, stream: str, text: str) -> None:
        file = sys.stderr if stream == "stderr" else sys.stdout
        safe = text if self._is_raw.get(stream, False) else clean_lines(text)
        # A log may hold what the terminal's encoding lacks.
        encoding = file.encoding or "utf-8"
        file.write(safe.encode(encoding, "replace").decode(encoding))
        file.flush()
