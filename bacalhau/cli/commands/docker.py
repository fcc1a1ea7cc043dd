"""`docker run`: a container as a job."""

from typing import Annotated, Any, Final

import typer

from bacalhau.cli.options import session_of
from bacalhau.cli.running.flags import DockerFlags, command_of
from bacalhau.cli.running.words import RunCommand

app = typer.Typer(
    help="Run containers as jobs.", no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

_WORDS: Final = """Run a container as a job, and wait for its end.

Flags go before IMAGE; all that follows it is for the container. The exit code is that of the
container's process if the job has one slot, otherwise 3 if it failed.
"""


def _run(
    context: typer.Context, flags: DockerFlags, image: str, arguments: list[str] | None
) -> int:
    from bacalhau.cli.running.build import docker_job
    from bacalhau.cli.running.submit import environment, run_job

    return run_job(
        session_of(context),
        flags,
        lambda suffix: docker_job(
            image, arguments or [], flags, suffix=suffix, environ=environment()
        ),
    )


_ARGUMENTS: Final[dict[str, Any]] = {
    "image": (Annotated[str, typer.Argument(metavar="IMAGE")], ...),
    "arguments": (Annotated[list[str] | None, typer.Argument(metavar="[COMMAND [ARG...]]")], None),
}

app.command("run", cls=RunCommand)(command_of(DockerFlags, _ARGUMENTS, _run, _WORDS))
