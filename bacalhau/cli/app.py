"""The commands put together, and how their failures become exit codes."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bacalhau.cli import exits
from bacalhau.cli.commands import (
    apply,
    delete,
    describe,
    download,
    explain,
    get,
    logs,
    node,
    serve,
    verbs,
    version,
    wait,
)
from bacalhau.cli.session import Session
from bacalhau.cli.text import clean

_GLOBAL_WITH_VALUE = ("--server", "--api-host", "--api-port")
_GLOBAL_FLAGS = ("--debug",)

app = typer.Typer(
    name="bacalhau",
    help="Run Docker and WebAssembly jobs where the data is.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    context: typer.Context,
    server: Annotated[
        str,
        typer.Option(help="The server's address. Default: $BACALHAU_SERVER, or this machine."),
    ] = "",
    api_host: Annotated[str, typer.Option(help="The server's host or address.")] = "",
    api_port: Annotated[str, typer.Option(help="The server's port.")] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options that every command takes, anywhere on the line."""
    if not server and (api_host or api_port):
        from bacalhau.client.address import server_from

        given = {"BACALHAU_API_HOST": api_host, "BACALHAU_API_PORT": api_port}
        kept = {key: os.environ[key] for key in given if key in os.environ}
        server = server_from(kept | {key: value for key, value in given.items() if value})
    context.obj = Session(server=server, debug=debug)


for module in (apply, get, describe, delete, verbs, wait, logs, download, explain, serve, version):
    module.register(app)
app.add_typer(node.app, name="node")


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Never lets an exception through."""
    words = hoisted(arguments)
    is_debug = "--debug" in words
    try:
        result: Any = app(words, standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else exits.OK
    except (KeyboardInterrupt, typer.Abort):
        return exits.INTERRUPTED
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit as error:
        # Typer turns a broken pipe into exit code 1, with a stand-in for stdout.
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":
            return _reader_gone()
        return error.code if isinstance(error.code, int) else exits.ERROR
    except Exception as error:  # noqa: BLE001 - the last stop: nobody is helped by a traceback
        if is_debug:
            import traceback

            traceback.print_exc()
        return _tell(error)


def _reader_gone() -> int:
    # Python would complain once more while it flushes at exit.
    sys.stdout = sys.__stdout__ or sys.stdout
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return exits.BROKEN_PIPE


def _tell(error: Exception) -> int:
    from bacalhau_api.errors import BacalhauError

    if isinstance(error, BacalhauError):
        exits.tell(error)
        return exits.code_of(error)
    # Typer brings its own copy of click, whose classes have no public name.
    code, show = getattr(error, "exit_code", None), getattr(error, "format_message", None)
    if isinstance(code, int) and callable(show):
        if message := show():
            print(f"error: {clean(message)}", file=sys.stderr)
            usage = getattr(getattr(error, "ctx", None), "command_path", "bacalhau")
            print(f"hint: see {usage} --help", file=sys.stderr)
        return code
    if isinstance(error, OSError):
        print(f"error: {clean(error)}", file=sys.stderr)
        return exits.ERROR
    print(f"error: {clean(type(error).__name__)}: {clean(error)}", file=sys.stderr)
    print("hint: this is a bug; --debug shows where it is", file=sys.stderr)
    return exits.ERROR


def hoisted(arguments: Sequence[str]) -> list[str]:
    """The options that every command takes, moved to the front, wherever they were written."""
    front: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--":
            rest += [word, *words]
            break
        if word in _GLOBAL_WITH_VALUE and words:
            front += [word, words.pop(0)]
        elif word in _GLOBAL_FLAGS or word.split("=")[0] in _GLOBAL_WITH_VALUE:
            front.append(word)
        else:
            rest.append(word)
    return front + rest
