"""`rollback`: back to an old revision."""

from typing import Annotated

import typer

from bacalhau.cli import exits
from bacalhau.cli.completing import complete_targets
from bacalhau.cli.options import Namespace, session_of
from bacalhau.cli.targets import parse_named
from bacalhau.cli.text import clean


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def rollback(
        context: typer.Context,
        words: Annotated[
            list[str],
            typer.Argument(metavar="KIND NAME | KIND/NAME", autocompletion=complete_targets),
        ],
        to: Annotated[str, typer.Option(help="A revision of its history, or gN: generation N.")],
        message: Annotated[str, typer.Option("--message", "-m", help="Why, for the history.")] = "",
        namespace: Namespace = "default",
    ) -> None:
        """Have an object be again what it was: the old spec as a new change, which runs as a new
        generation if it affects execution. A job that is gone is made again.
        """
        from bacalhau_api.v1 import KINDS
        from bacalhau_api.v1.job import Job
        from bacalhau_api.v1.node import Node

        targets = parse_named(words)
        if len(targets) != 1:
            raise exits.usage("rollback", "is for one object at a time", hint="name one")
        target = targets[0]
        kind = KINDS[target.kind.kind]
        if kind is not Job and kind is not Node:
            hint = "roll back its job instead"
            raise exits.usage(target.kind.singular, "cannot be rolled back", hint=hint)
        with session_of(context).client() as client:
            done = client.rollback(kind, target.name, to, namespace, message=message)
        for warning in done.warnings:
            exits.warn(warning)
        label = f"{target.kind.singular}/{clean(target.name)}"
        if done.outcome == "unchanged":
            print(f"{label} unchanged: it is as it was")
            return
        generation = f", generation {done.generation}" if done.generation else ""
        print(f"{label} rolled back to {clean(to)} (revision {done.revision}{generation})")
