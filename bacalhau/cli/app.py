"""The commands put together, and how their failures become exit codes."""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bacalhau.cli import exits
from bacalhau.cli.commands import (
    apply,
    completion,
    delete,
    describe,
    docker,
    download,
    explain,
    get,
    gitops,
    logs,
    node,
    review,
    rollback,
    serve,
    verbs,
    version,
    wait,
    wasm,
)
from bacalhau.cli.examples import add_examples, epilog
from bacalhau.cli.session import Session
from bacalhau.cli.text import clean

_GLOBAL_WITH_VALUE = ("--server", "--api-host", "--api-port", "--node-dir")
_GLOBAL_FLAGS = ("--debug", "--local")

app = typer.Typer(
    name="bacalhau",
    help="Run Docker and WebAssembly jobs where the data is.",
    epilog=epilog(""),
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    context: typer.Context,
    server: Annotated[
        str,
        typer.Option(
            metavar="URL", help="The server's address. Default: $BACALHAU_SERVER, or this machine."
        ),
    ] = "",
    api_host: Annotated[
        str, typer.Option(metavar="HOST", help="The server's host or address.")
    ] = "",
    api_port: Annotated[str, typer.Option(metavar="PORT", help="The server's port.")] = "",
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="Ask the agent of this machine, with or without an orchestrator."
        ),
    ] = False,
    node_dir: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="The agent's data directory; implies --local. Default: $BACALHAU_NODE_DIR, "
            "$BACALHAU_DIR, ~/.bacalhau or /var/lib/bacalhau.",
        ),
    ] = "",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Options that every command takes, anywhere on the line."""
    if not server and (api_host or api_port):
        from bacalhau.client.address import server_from

        given = {"BACALHAU_API_HOST": api_host, "BACALHAU_API_PORT": api_port}
        kept = {key: os.environ[key] for key in given if key in os.environ}
        server = server_from(kept | {key: value for key, value in given.items() if value})
    if (local or node_dir) and server and not server.startswith("unix:"):
        raise typer.BadParameter(
            "asks another than --local; give one of the two", param_hint="--server"
        )
    context.obj = Session(server=server, debug=debug, local=local, node_dir=node_dir)


for module in (
    apply, review, get, describe, delete, verbs, rollback, wait, logs, download, explain, serve,
    version,
):  # fmt: skip
    module.register(app)
completion.register(app)
for group, name in (
    (node.app, "node"),
    (docker.app, "docker"),
    (wasm.app, "wasm"),
    (gitops.app, "gitops"),
):
    add_examples(group, f"{name} ")
    app.add_typer(group, name=name)
add_examples(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Never lets an exception through."""
    words = list(arguments)
    is_debug = "--debug" in words
    try:
        words = hoisted(arguments)
        if not words:
            words = ["--help"]
        result: Any = app(words, standalone_mode=False, prog_name="bacalhau")
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
        code = error.code if isinstance(error.code, int) else exits.ERROR
        return exits.of_command(_without_globals(words), code)
    except Exception as error:  # noqa: BLE001 - the last stop: nobody is helped by a traceback
        if is_debug:
            import traceback

            traceback.print_exc()
        code = exits.of_command(_without_globals(words), _tell(error))
        _tell_of_agent(error, words)
        return code


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
        if type(error).__name__ == "NoArgsIsHelpError":
            print(show())
            return exits.OK
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


def _tell_of_agent(error: Exception, words: Sequence[str]) -> None:
    """Where no orchestrator answers, but an agent runs here: say how to ask that one."""
    is_asked = any(word.split("=")[0] in ("--local", "--node-dir") for word in words)
    if getattr(error, "reason", "") != "ConnectionFailed" or is_asked:
        return
    from bacalhau.localsocket import find_socket, is_answered

    found = None if "serve" in words else find_socket(os.environ)
    if found is not None and is_answered(found):
        exits.note(
            "hint: a node's agent runs on this machine: see `bacalhau node status`, or add --local "
            "to ask it"
        )


def _without_globals(words: list[str]) -> list[str]:
    """A command line, hoisted, from the command on."""
    rest = list(words)
    while rest and rest[0].startswith("-"):
        del rest[: 2 if rest[0] in _GLOBAL_WITH_VALUE else 1]
    return rest


def hoisted(arguments: Sequence[str]) -> list[str]:
    """The options that every command takes, moved to the front, wherever they were written; but
    not from `docker run` and `wasm run`, where they may be those of the workload. Raises InvalidError
    for one without its value, which would take the command for it in front."""
    front: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word == "--" or (word == "run" and rest[-1:] in (["docker"], ["wasm"])):
            rest += [word, *words]
            break
        if word in _GLOBAL_WITH_VALUE:
            if not words:
                raise exits.usage("", f"Option '{word}' requires an argument.")
            front += [word, words.pop(0)]
        elif word in _GLOBAL_FLAGS or word.split("=")[0] in _GLOBAL_WITH_VALUE:
            front.append(word)
        else:
            rest.append(word)
    return front + rest
