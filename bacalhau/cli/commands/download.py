"""`download`: results to a directory."""

import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bacalhau.cli import exits
from bacalhau.cli.completing import complete_jobs
from bacalhau.cli.options import Namespace, check_choice, session_of
from bacalhau.cli.text import clean, now, size, table

if TYPE_CHECKING:
    from bacalhau.client.download import Progress
    from bacalhau.client.sync import Client
    from bacalhau.replies import ResultItem

LINK_SECONDS_MAX = 7 * 86400
LAYOUTS = ("auto", "merged", "partitions")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def download(
        context: typer.Context,
        name: Annotated[
            str, typer.Argument(metavar="JOB | execution/NAME", autocompletion=complete_jobs)
        ],
        output: Annotated[
            Path | None,
            typer.Option(
                "--output", "--output-dir", "-o", help="The directory. Default: ./job-JOB"
            ),
        ] = None,
        layout: Annotated[
            str, typer.Option(help="auto, merged or partitions: what to do with several slots.")
        ] = "auto",
        generation: Annotated[
            int | None, typer.Option(min=1, help="Default: the present one.")
        ] = None,
        partial: Annotated[
            bool, typer.Option("--partial", help="What there is, though the job goes on.")
        ] = False,
        links: Annotated[
            bool,
            typer.Option(
                "--links", help="Download nothing; print links to the archives published to S3."
            ),
        ] = False,
        expires: Annotated[
            str, typer.Option(help="--links: how long they can be used, up to 7d.")
        ] = "1h",
        namespace: Namespace = "default",
    ) -> int:
        """Download the accepted results of a job, or the outputs of one execution.

        Interrupted, the same command goes on where it was. Contents are checked against the
        digest that the node recorded.
        """
        check_choice(layout, LAYOUTS, "--layout")
        if links and output is not None:
            raise exits.usage("--output", "is not for --links", hint="leave one of them out")
        seconds = link_seconds(expires)
        with session_of(context).client() as client:
            if links:
                return print_links(
                    client, name, namespace, seconds, generation=generation, is_partial=partial
                )
            return download_job(
                client,
                name,
                namespace,
                output,
                layout=layout,
                generation=generation,
                is_partial=partial,
            )


def download_job(
    client: "Client",
    name: str,
    namespace: str,
    into: Path | None,
    *,
    layout: str = "auto",
    generation: int | None = None,
    is_partial: bool = False,
    is_quiet: bool = False,
) -> int:
    """Download what `name` says, and say where it is, unless quiet; the exit code."""
    from bacalhau.client.download import download as fetch
    from bacalhau.client.layout import Layout

    label, items, notes = _items(client, name, namespace, generation, partial=is_partial)
    into = into or Path(default_name(label, namespace))
    meter = _Meter()
    try:
        done = fetch(
            client, items, namespace, into, layout=cast(Layout, layout), on_progress=meter.show
        )
    except KeyboardInterrupt:
        meter.close()
        exits.note(
            "interrupted; this goes on where it was: "
            f"bacalhau download {clean(name)} -o {shlex.quote(clean(into))}{_in(namespace)}"
        )
        return exits.INTERRUPTED
    finally:
        meter.close()
    for note in (*notes, *done.notes):
        exits.note(note)
    if not is_quiet:
        print(f"{clean(done.path)}: {done.files} files, {size(done.size_bytes)}")
    return exits.OK


def link_seconds(text: str) -> int:
    """How long links are to last, from words such as `90m` or `7d`."""
    from bacalhau_api.quantity import parse_seconds

    days = text.removesuffix("d")
    try:
        seconds = int(parse_seconds(f"{int(days) * 24}h" if days != text else text))
    except ValueError as error:
        raise exits.usage("--expires", str(error), text, hint="such as 90m, 12h or 7d") from error
    if not 1 <= seconds <= LINK_SECONDS_MAX:
        raise exits.usage("--expires", "is from 1s to 7d", text)
    return seconds


def print_links(
    client: "Client",
    name: str,
    namespace: str,
    seconds: int,
    *,
    generation: int | None = None,
    is_partial: bool = False,
) -> int:
    """Print a link to each published archive, and why some have none; the exit code."""
    from bacalhau_api.errors import NotFoundError, TerminalError

    _, items, notes = _items(client, name, namespace, generation, partial=is_partial)
    cells: list[list[str]] = []
    failures: list[NotFoundError] = []
    for item in items:
        try:
            link = client.link(item.execution, namespace, seconds=seconds)
        except NotFoundError as error:
            failures.append(error)
            continue
        # Not cut, and not cleaned of anything but what a terminal would act on: it is signed.
        cells.append([item.slot, item.execution, link.url])
    for line in table(["SLOT", "EXECUTION", "LINK"], cells) if cells else ():
        print(line)
    for note in notes:
        exits.note(note)
    if cells:
        until = now() + timedelta(seconds=seconds)
        exits.note(
            f"whoever has a link can download until {until:%Y-%m-%d %H:%M} UTC, without other rights"
        )
    if not failures:
        return exits.OK
    first = failures[0]
    if cells:
        exits.warn(f"{len(failures)} of {len(items)} results have no link: {first.message}")
        return exits.ERROR
    hint = f"download it: bacalhau download {clean(name)}{_in(namespace)}"
    raise TerminalError(first.message, hint=first.hint or hint)


def _in(namespace: str) -> str:
    return "" if namespace == "default" else f" -n {clean(namespace)}"


def _items(
    client: "Client", word: str, namespace: str, generation: int | None, *, partial: bool
) -> "tuple[str, list[ResultItem], list[str]]":
    """What to download: a label, the results, and notes for the user."""
    from bacalhau.cli.targets import job_name, parse_named
    from bacalhau.client.download import result_of
    from bacalhau.kinds import EXECUTION
    from bacalhau_api.errors import NotFoundError, TerminalError
    from bacalhau_api.v1.execution import Execution
    from bacalhau_api.v1.job import Job

    if "/" in word and (target := parse_named([word])[0]).kind == EXECUTION:
        execution = client.get(Execution, target.name, namespace)
        return target.name, [result_of(execution)], []
    name = job_name(word)
    job = client.get(Job, name, namespace)
    results = client.results(name, namespace, generation=generation)
    is_open = not job.is_over and results.generation == job.metadata.generation
    count = len(results.items)
    if not count:
        raise NotFoundError(
            f"job {name} has no accepted results{' yet' if is_open else ''}",
            hint=f"bacalhau wait {name}"
            if is_open
            else f"see what its attempts left: bacalhau get executions --field-selector job={name};"
            " bacalhau download execution/NAME",
        )
    notes = []
    if results.slots > count:
        text = f"{count} of {results.slots} slots have a result"
        if is_open and not partial:
            hint = f"wait for the rest (bacalhau wait {name}), or take these: --partial"
            raise TerminalError(f"job {name} is not over: {text}", hint=hint)
        notes.append(text)
    return name, list(results.items), notes


def default_name(label: str, namespace: str) -> str:
    """The directory that is made where none is named."""
    return f"job-{label}" if namespace == "default" else f"job-{namespace}-{label}"


class _Meter:
    """A bar on a terminal; elsewhere nothing, since the outcome says it all."""

    def __init__(self) -> None:
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("download", total=None)
            self._bar.start()

    def show(self, progress: "Progress") -> None:
        """How far it is."""
        if self._bar is not None:
            self._bar.update(self._task, total=progress.total_bytes, completed=progress.done_bytes)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
