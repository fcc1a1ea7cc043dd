"""`explain` and `history`: why something is as it is, and how it came to be."""

from typing import Annotated, Any

import typer

from bacalhau.cli.columns import dig
from bacalhau.cli.options import Namespace, Words, check_choice, session_of
from bacalhau.cli.session import print_json, print_yaml
from bacalhau.cli.targets import parse_named
from bacalhau.cli.text import age, clean, now, parse_time, table

_Output = Annotated[str, typer.Option("--output", "-o", help="text, json or yaml.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(explain)
    app.command()(history)


def explain(
    context: typer.Context, words: Words, namespace: Namespace = "default", output: _Output = "text"
) -> None:
    """Say why an object is as it is, what it waits for, and what would help."""
    check_choice(output, ("text", "json", "yaml"), "--output")
    session = session_of(context)
    for number, target in enumerate(parse_named(words)):
        told = session.fetch(target.kind.path(namespace, target.name, "explain"))
        if output != "text":
            print_json(told) if output == "json" else print_yaml(told)
            continue
        if number:
            print()
        for line in explanation_lines(told):
            print(line)


def explanation_lines(told: Any) -> list[str]:
    """An explanation for people."""
    phase = f" is {clean(told['phase'])}" if told.get("phase") else ""
    lines = [f"{told['kind'].lower()}/{clean(told['name'])}{phase}: {clean(told['headline'])}"]
    if waiting := told.get("waiting"):
        lines += waiting_lines(waiting)
    lines += [f"  - {clean(fact)}" for fact in told.get("because", ())]
    open_slots = [slot for slot in told.get("slots", ()) if slot.get("state") != "Accepted"]
    if open_slots:
        lines.append("open slots:")
        cells = [
            [s["slot"], s["state"], s.get("node", ""), str(s.get("attempts", 0)),
             s.get("message", "")]
            for s in open_slots[:20]
        ]  # fmt: skip
        rows = table(["SLOT", "STATE", "NODE", "ATTEMPTS", "MESSAGE"], cells)
        lines += [f"  {row}" for row in rows]
        if len(open_slots) > 20:
            lines.append(f"  and {len(open_slots) - 20} more")
    for remedy in told.get("remedies", ()):
        lines.append(f"try: {clean(remedy)}")
    return lines


def waiting_lines(waiting: Any) -> list[str]:
    """What something waits for, since when, until when, and who moves it next."""
    since = age(dig(waiting, "since"), now())
    text = clean(waiting.get("message") or waiting["what"])
    lines = [f"waiting: {text} ({clean(waiting['what'])}, for {since})"]
    until = parse_time(waiting.get("until"))
    deadline = f"until {until:%Y-%m-%d %H:%M:%S} UTC" if until else "without a deadline"
    lines.append(f"moved next by: {clean(waiting['mover'])}, {deadline}")
    return lines


def history(
    context: typer.Context,
    words: Words,
    namespace: Namespace = "default",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many.")] = 100,
    output: _Output = "text",
) -> None:
    """Show what happened to an object, also after it was deleted."""
    check_choice(output, ("text", "json", "yaml"), "--output")
    session = session_of(context)
    for target in parse_named(words):
        path = target.kind.path(namespace, target.name, "history")
        told = session.fetch(path, {"limit": str(limit)})
        if output != "text":
            print_json(told["items"]) if output == "json" else print_yaml(told["items"])
            continue
        for line in history_lines(told["items"]):
            print(line)


def history_lines(items: Any) -> list[str]:
    """History for people."""
    cells = []
    for item in items:
        moment = parse_time(item["time"])
        when = f"{moment:%Y-%m-%d %H:%M:%S}" if moment else "-"
        phase = "(removed)" if item.get("removed") else item.get("phase", "")
        cells.append([when, item["actor"], item["reason"], phase, item.get("message", "")])
    return table(["TIME", "WHO", "WHAT", "PHASE", "MESSAGE"], cells)
