"""`explain` and `history`: why something is as it is, and how it came to be."""

from typing import Annotated, Any

import typer

from bacalhau.cli.columns import dig
from bacalhau.cli.completing import complete_jobs, complete_nodes
from bacalhau.cli.options import Namespace, Words, check_choice, session_of
from bacalhau.cli.session import print_json, print_yaml
from bacalhau.cli.targets import job_name, parse_named
from bacalhau.cli.text import age, clean, now, parse_time, table

_Output = Annotated[str, typer.Option("--output", "-o", help="text, json or yaml.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(explain)
    app.command()(history)


def explain(
    context: typer.Context,
    words: Words,
    namespace: Namespace = "default",
    job: Annotated[
        str, typer.Option(help="Of a node: whether this job fits it.", autocompletion=complete_jobs)
    ] = "",
    node: Annotated[
        str,
        typer.Option(help="Of a job: whether it fits this node.", autocompletion=complete_nodes),
    ] = "",
    output: _Output = "text",
) -> None:
    """Say why an object is as it is, what it waits for, and what would help; also of what is fine.
    With --job or --node, whether one job fits one node, rule by rule."""
    check_choice(output, ("text", "json", "yaml"), "--output")
    session = session_of(context)
    pair = {"job": f"{namespace}/{job_name(job)}"} if job else {}
    pair |= {"node": node.removeprefix("node/")} if node else {}
    for number, target in enumerate(parse_named(words)):
        told = session.fetch(target.kind.path(namespace, target.name, "explain"), pair)
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
    if rules := told.get("rules"):
        cells = [[r["rule"], "ok" if r["ok"] else "NO", r.get("message", "")] for r in rules]
        lines += [f"  {row}" for row in table(["RULE", "", "MESSAGE"], cells)]
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
    changes: Annotated[
        bool,
        typer.Option("--changes", help="Only what changed its spec, labels or annotations."),
    ] = False,
    output: _Output = "text",
) -> None:
    """Show what happened to an object: when, who, what, why, from which file and commit. Also
    after it was deleted. REV is what `diff`, `rollback` and `get --at` go by."""
    check_choice(output, ("text", "json", "yaml"), "--output")
    session = session_of(context)
    for target in parse_named(words):
        path = target.kind.path(namespace, target.name, "history")
        asked = {"limit": str(limit)} | ({"declared": "true"} if changes else {})
        told = session.fetch(path, asked)
        if output != "text":
            print_json(told["items"]) if output == "json" else print_yaml(told["items"])
            continue
        for line in history_lines(told["items"]):
            print(line)


def history_lines(items: Any) -> list[str]:
    """History for people."""
    has_origin = any(item.get("source") or item.get("commit") for item in items)
    header = ["REV", "GEN", "TIME", "WHO", "WHAT", "PHASE", *(["FROM"] if has_origin else [])]
    cells = []
    for item in items:
        moment = parse_time(item["time"])
        when = f"{moment:%Y-%m-%d %H:%M:%S}" if moment else "-"
        phase = "(removed)" if item.get("removed") else item.get("phase", "")
        generation = str(item.get("generation") or "")
        row = [str(item["revision"]), generation, when, item["actor"], item["reason"], phase]
        row += [_origin(item)] if has_origin else []
        cells.append([*row, item.get("message", "")])
    return table([*header, "MESSAGE"], cells)


def _origin(item: Any) -> str:
    commit, source = item.get("commit", ""), item.get("source", "")
    short = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
    return f"{source}@{short}" if commit else source
