"""`version`."""

from typing import Annotated

import typer

from bacalhau.cli.options import check_choice, session_of


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def version(
        context: typer.Context,
        client: Annotated[bool, typer.Option("--client", help="Do not ask the server.")] = False,
        output: Annotated[str, typer.Option("--output", "-o", help="table or json.")] = "table",
    ) -> int:
        """Print the versions of this client and of the server."""
        from bacalhau.cli.versions import print_version

        check_choice(output, ("table", "json"), "--output")
        server = "" if client else session_of(context).address
        return print_version(client_only=client, server=server, as_json=output == "json")
