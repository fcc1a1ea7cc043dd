"""`wasm run`: a WebAssembly module as a job."""

from typing import Annotated, Any, Final

import typer

from bacalhau.cli.options import session_of
from bacalhau.cli.running.flags import WasmFlags, command_of
from bacalhau.cli.running.words import RunCommand

app = typer.Typer(
    help="Run WebAssembly modules as jobs.", no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

_WORDS: Final = """Run a WebAssembly module as a job, and wait for its end.

MODULE is a file of this machine, which travels in the job if it is small (about 360 kB packed), or
https://…, s3://…, ipfs://… or file:///PATH on the node. Flags go before MODULE; all that follows it
is for the program. The exit code is that of the program if the job has one slot, otherwise 3 if it
failed.
"""


def _run(context: typer.Context, flags: WasmFlags, module: str, arguments: list[str] | None) -> int:
    from bacalhau.cli.running.build import wasm_job
    from bacalhau.cli.running.submit import environment, run_job

    return run_job(
        session_of(context),
        flags,
        lambda suffix: wasm_job(
            module, arguments or [], flags, suffix=suffix, environ=environment()
        ),
    )


_ARGUMENTS: Final[dict[str, Any]] = {
    "module": (Annotated[str, typer.Argument(metavar="MODULE")], ...),
    "arguments": (Annotated[list[str] | None, typer.Argument(metavar="[ARG...]")], None),
}

app.command("run", cls=RunCommand)(command_of(WasmFlags, _ARGUMENTS, _run, _WORDS))
