"""`node`: what operators do with nodes."""

from typing import Annotated, Literal

import typer

from bacalhau.cli.completing import complete_nodes
from bacalhau.cli.options import OUTPUTS, OutputDefault, check_choice, session_of
from bacalhau.cli.text import clean
from bacalhau.kinds import NODE, STATUS_PATH

app = typer.Typer(
    help="Look after nodes.", no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
_Nodes = Annotated[list[str], typer.Argument(metavar="NODE...", autocompletion=complete_nodes)]
Verb = Literal["approve", "reject", "cordon", "uncordon", "drain"]
_DONE = {"approve": "approved", "reject": "rejected", "cordon": "cordoned",
         "uncordon": "uncordoned", "drain": "draining"}  # fmt: skip


@app.command("list")
def list_nodes(
    context: typer.Context,
    output: OutputDefault = "table",
    selector: Annotated[str, typer.Option("--selector", "-l", help="Labels.")] = "",
) -> None:
    """Show all nodes."""
    from bacalhau.cli.commands.get import fetch_all, show_list

    check_choice(output, OUTPUTS, "--output")
    items = fetch_all(session_of(context), NODE, None, {"labelSelector": selector})
    show_list(NODE, items, output, with_namespace=False)


@app.command()
def status(
    context: typer.Context,
    output: Annotated[
        str, typer.Option("--output", "-o", help="table, wide, json or yaml.")
    ] = "table",
) -> None:
    """Show how this machine's node is, by the word of its own agent.

    Works with and without an orchestrator.
    """
    from bacalhau.cli.nodestatus import status_lines
    from bacalhau.cli.session import print_json, print_yaml
    from bacalhau.cli.text import now
    from bacalhau.kinds import EXECUTION

    check_choice(output, ("table", "wide", "json", "yaml"), "--output")
    session = session_of(context).at_node()
    told = session.fetch(STATUS_PATH)
    if output == "json":
        print_json(told)
        return
    if output == "yaml":
        print_yaml(told)
        return
    for line in status_lines(told, now()):
        print(line)
    if output == "wide":
        from bacalhau.cli.commands.get import fetch_all, show_list

        print()
        items = fetch_all(session, EXECUTION, None, {})
        show_list(EXECUTION, items, "wide", with_namespace=True)


@app.command()
def approve(context: typer.Context, nodes: _Nodes) -> None:
    """Let nodes take part."""
    _each(context, "approve", nodes)


@app.command()
def reject(context: typer.Context, nodes: _Nodes) -> None:
    """Let nodes take part no longer."""
    _each(context, "reject", nodes)


@app.command()
def cordon(context: typer.Context, nodes: _Nodes) -> None:
    """Give nodes no new executions."""
    _each(context, "cordon", nodes)


@app.command()
def uncordon(context: typer.Context, nodes: _Nodes) -> None:
    """Give nodes executions again."""
    _each(context, "uncordon", nodes)


@app.command()
def drain(context: typer.Context, nodes: _Nodes) -> None:
    """Give nodes no new executions, and move away those they have."""
    _each(context, "drain", nodes)


@app.command()
def token(
    context: typer.Context,
    node: Annotated[str, typer.Option(help="Good for this node name only.")] = "",
    ttl: Annotated[int, typer.Option(min=1, help="Good for so many seconds.")] = 3600,
) -> None:
    """Make a token with which one machine can join, once. Only the token goes to stdout."""
    session = session_of(context)
    with session.client() as client:
        made = client.create_join_token(node=node, ttl_seconds=ttl)
    print(clean(made.token))
    from bacalhau.cli.exits import note

    name = f" --name {node}" if node else ""
    note(f"good once, for {made.ttl_seconds} s; on the machine that is to join:")
    note(f"  bacalhau serve --role compute --orchestrator {session.address} --token TOKEN{name}")


def _each(context: typer.Context, verb: Verb, nodes: list[str]) -> None:
    with session_of(context).client() as client:
        for word in nodes:
            name = word.removeprefix("node/")
            client.node_verb(verb, name)
            print(f"node/{clean(name)} {_DONE[verb]}")
