"""`delete`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from bacalhau.cli.options import Namespace, session_of
from bacalhau.cli.targets import Target, parse_named
from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau.client.sync import Client
    from bacalhau_api.meta import Resource

EXECUTIONS_FINALIZER: Final = "bacalhau.org/executions"


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
            bool,
            typer.Option("--force", help="At once, whatever is to be cleaned up or still runs."),
        ] = False,
        wait: Annotated[
            bool,
            typer.Option("--wait/--no-wait", help="Wait until they are gone, at most --timeout."),
        ] = True,
        timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="See --wait.")] = 10,
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
            if target.kind.kind not in ("Job", "Node", "RetiredJob", "Source", "Namespace"):
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
                if gone.deleted or (wait and _is_gone(client, kind, target.name, where, timeout)):
                    print(f"{label} deleted", flush=True)
                    continue
                waits = _pending(gone.pending)
                print(f"{label} deleting{waits}", flush=True)


def _is_gone(
    client: "Client", kind: "type[Resource]", name: str, namespace: str, seconds: float
) -> bool:
    """Whether an object that is being deleted is gone before the time is over."""
    where = namespace if kind.namespaced else None
    updates = client.watch(kind, namespace=where, fields=f"name={name}", timeout_seconds=seconds)
    is_there = False
    for update in updates:
        is_there = is_there or update.item is not None
        # Gone before the watch began, or while it went on.
        if update.type == "DELETED" or (update.type == "SYNCED" and not is_there):
            return True
    return False


def _pending(finalizers: tuple[str, ...]) -> str:
    words = ["its executions" if x == EXECUTIONS_FINALIZER else clean(x) for x in finalizers]
    return f" (waits until {' and '.join(words)} are cleaned up)" if words else ""


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
