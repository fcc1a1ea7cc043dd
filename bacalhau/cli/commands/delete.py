"""`delete`."""

from pathlib import Path
from typing import Annotated

import typer

from bacalhau.cli.options import Namespace, session_of
from bacalhau.cli.targets import Target, parse_named
from bacalhau.cli.text import clean


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def delete(
        context: typer.Context,
        words: Annotated[
            list[str] | None, typer.Argument(metavar="[KIND NAME... | KIND/NAME...]")
        ] = None,
        file: Annotated[
            list[str] | None, typer.Option("--file", "-f", help="Delete what these files declare.")
        ] = None,
        namespace: Namespace = "default",
        force: Annotated[
            bool, typer.Option("--force", help="At once, whatever still has to be cleaned up.")
        ] = False,
        ignore_not_found: Annotated[
            bool, typer.Option("--ignore-not-found", help="What is gone already is no error.")
        ] = False,
    ) -> None:
        """Delete jobs or nodes."""
        from bacalhau_api.errors import InvalidError, NotFoundError, Problem
        from bacalhau_api.v1 import KINDS

        wanted = [(t, namespace) for t in parse_named(words)] if words else []
        for path in file or []:
            wanted += _declared(path, namespace)
        if not wanted:
            raise typer.BadParameter("name what to delete, or give a file with -f")
        for target, _ in wanted:
            if target.kind.kind not in ("Job", "Node"):
                hint = "delete or stop its job instead"
                message = "belongs to a controller and cannot be deleted"
                raise InvalidError([Problem(target.kind.singular, message, hint=hint)])
        with session_of(context).client() as client:
            for target, where in wanted:
                kind = KINDS[target.kind.kind]
                label = f"{target.kind.singular}/{clean(target.name)}"
                try:
                    gone = client.delete(kind, target.name, where, force=force)
                except NotFoundError:
                    if not ignore_not_found:
                        raise
                    print(f"{label} not found")
                    continue
                waits = f" (waits for {clean(', '.join(gone.pending))})" if gone.pending else ""
                print(f"{label} {'deleted' if gone.deleted else 'deleting'}{waits}")


def _declared(path: str, namespace: str) -> list[tuple[Target, str]]:
    from bacalhau.cli.files import read_documents
    from bacalhau.kinds import find_kind

    found = []
    for document in read_documents([Path(path)], recursive=False, namespace=namespace):
        kind = find_kind(document.resource.kind)
        if kind is not None and document.resource.name:
            where = document.resource.metadata.namespace
            found.append((Target(kind, document.resource.name), where))
    return found
