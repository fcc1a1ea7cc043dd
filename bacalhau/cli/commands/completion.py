"""`completion`: the script that teaches a shell to complete this command's words."""

from typing import Annotated, Final

import typer

from bacalhau.cli.options import check_choice

SHELLS: Final = ("bash", "zsh", "fish", "powershell")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def completion(
        shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh, fish, powershell.")],
    ) -> None:
        """Print a script that lets a shell complete commands, options, and names of objects.

        SHELL is bash, zsh, fish or powershell. For bash, put `source <(bacalhau completion bash)` into ~/.bashrc.
        """
        from typer.completion import get_completion_script  # type: ignore[attr-defined]

        check_choice(shell, SHELLS, "SHELL")
        variable = "_BACALHAU_COMPLETE"
        print(get_completion_script(prog_name="bacalhau", complete_var=variable, shell=shell))
