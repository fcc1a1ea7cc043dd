"""Options that several commands share."""

from typing import Annotated

import typer

from bacalhau.cli.completing import complete_jobs, complete_targets
from bacalhau.cli.session import Session

Namespace = Annotated[str, typer.Option("--namespace", "-n", help="The namespace.")]
AllNamespaces = Annotated[bool, typer.Option("--all-namespaces", "-A", help="All namespaces.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0, help="Give up after so many seconds.")
]
OutputDefault = Annotated[
    str, typer.Option("--output", "-o", help="table, wide, json, yaml or name.")
]
Words = Annotated[
    list[str],
    typer.Argument(metavar="KIND [NAME...] | KIND/NAME...", autocompletion=complete_targets),
]
JobArgument = Annotated[str, typer.Argument(metavar="JOB", autocompletion=complete_jobs)]
JobArguments = Annotated[list[str], typer.Argument(metavar="JOB...", autocompletion=complete_jobs)]

OUTPUTS = ("table", "wide", "json", "yaml", "name")


def session_of(context: typer.Context) -> Session:
    """The session that the callback of the application made."""
    session = context.obj
    assert isinstance(session, Session)
    return session


def check_choice(value: str, choices: tuple[str, ...], option: str) -> str:
    """A value from a fixed set. Raises a usage error."""
    if value not in choices:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(choices)}", param_hint=option)
    return value
