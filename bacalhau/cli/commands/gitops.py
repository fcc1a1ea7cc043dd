"""`gitops`: directories whose manifests are kept applied."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bacalhau.cli import exits
from bacalhau.cli.options import Namespace, Timeout, check_choice, session_of
from bacalhau.cli.text import clean
from bacalhau.kinds import CLAIM, SOURCE

if TYPE_CHECKING:
    from bacalhau_api.v1.source import Source

app = typer.Typer(
    help="Keep what a directory declares applied.", no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip

_MODES = ("enforce", "detect", "off")
_VIEWS = ("auto", "git", "files")
_RULES = ("delete", "retain")

SourceName = Annotated[str, typer.Argument(metavar="SOURCE")]
Mode = Annotated[
    str, typer.Option(help="enforce, detect (report what differs, change nothing) or off.")
]
Prune = Annotated[str, typer.Option(help="delete or retain objects whose file is gone.")]
MaxPrune = Annotated[
    int | None,
    typer.Option(min=0, max=100, help="More deletions than so many % wait for approval."),
]
View = Annotated[
    str, typer.Option(help="git (the commit at HEAD), files, or auto: git in a clone.")
]
Settle = Annotated[
    float | None,
    typer.Option(min=0.1, max=60, help="files: nothing may have changed for so many seconds."),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Pattern as in .gitignore, repeatable.")]
Into = Annotated[str, typer.Option(help="The namespace of manifests that name none.")]


@app.command()
def run(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    name: Annotated[str, typer.Option(help="The source's name. Default: the directory's.")] = "",
    mode: Mode = "",
    prune: Prune = "",
    max_prune: MaxPrune = None,
    view: View = "",
    settle: Settle = None,
    ignore: Ignore = None,
    into_namespace: Into = "",
    once: Annotated[
        bool, typer.Option("--once", help="Apply the present state, then end.")
    ] = False,
    sweep: Annotated[
        float, typer.Option(min=1, max=3600, help="Look at least every so many seconds.")
    ] = 60.0,
    timeout: Timeout = None,
) -> int:
    """Keep a directory applied from here, against any orchestrator.

    Ends with Ctrl-C. With --once the exit code tells whether everything is as the directory says.
    """
    import asyncio

    from bacalhau.client.aio import AsyncClient
    from bacalhau.gitops.place import parse_place
    from bacalhau.gitops.run import run as run_source
    from bacalhau.logs import set_up_logging
    from bacalhau_api.errors import UnavailableError

    place = f"{name}={directory}" if name else str(directory)
    source, root = parse_place(place, "DIR")
    asked = _request(mode, prune, max_prune, view, settle, ignore, into_namespace)
    session = session_of(context)
    set_up_logging("warning", "text")
    told: list[str] = []

    def tell(found: "Source") -> None:
        status = found.status
        line = f"{status.phase} {status.revision_seen[:12] or '-'} {status.message}"
        if told[-1:] != [line] and status.phase != "Pending":
            told[:] = [line]
            print(f"source/{clean(source)} {clean(line)}", flush=True)

    async def work() -> "Source | None":
        async with AsyncClient(session.address, token=session.token) as client:
            return await run_source(
                client,
                source,
                root,
                asked,
                once=once,
                timeout_seconds=timeout,
                sweep_seconds=sweep,
                on_source=tell,
            )

    try:
        last = asyncio.run(work())
    except TimeoutError:
        exits.note(f"error: not done after {timeout:g} s")
        return exits.TIMEOUT
    except BaseExceptionGroup as group:
        leaf: BaseException = group
        while isinstance(leaf, BaseExceptionGroup):
            leaf = leaf.exceptions[0]
        raise leaf from group
    if not once:
        return exits.OK
    if last is None:
        raise UnavailableError("the server told nothing of the source")
    for problem in last.status.problems:
        _tell(problem)
    return exits.OK if last.status.phase in ("Synced", "Suspended", "Off") else exits.ERROR


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR")],
    view: View = "files",
    ignore: Ignore = None,
) -> int:
    """Read a directory as a source would, without any server: for hooks and tests of changes.

    Tells everything that is wrong by file and line; the exit code is 1 then. What depends on what
    is stored is told by `bacalhau plan`.
    """
    import asyncio

    from bacalhau.gitops.check import check_directory

    spec = _request("", "", None, view, 0.1, ignore, "")
    found = asyncio.run(check_directory(directory.expanduser().absolute(), spec))
    for problem in found.problems:
        _tell(problem)
    if not found.problems:
        print(f"{len(found.declared)} objects in {found.files} files")
    return exits.ERROR if found.problems else exits.OK


@app.command("set")
def set_(
    context: typer.Context,
    name: SourceName,
    mode: Mode = "",
    prune: Prune = "",
    max_prune: MaxPrune = None,
    view: View = "",
    settle: Settle = None,
    ignore: Ignore = None,
    into_namespace: Into = "",
) -> None:
    """Change how a source is looked after; makes it if it is not there."""
    from bacalhau.gitops.wire import put

    asked = _request(mode, prune, max_prune, view, settle, ignore, into_namespace)
    with session_of(context).client() as client:
        client.send(put(name, asked))
    print(f"source/{clean(name)} configured")


@app.command()
def status(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[SOURCE]")] = "",
    objects: Annotated[bool, typer.Option("--objects", help="Each object, too.")] = False,
    output: Annotated[
        str, typer.Option("--output", "-o", help="table, wide, json or yaml.")
    ] = "table",
) -> int:
    """Show all sources, or one with everything that is wrong, by file and line.

    The exit code is 1 if the named source is not as its directory says.
    """
    from bacalhau.cli.commands.get import fetch_all, show_list
    from bacalhau.cli.session import print_json, print_yaml

    check_choice(output, ("table", "wide", "json", "yaml"), "--output")
    session = session_of(context)
    if not name:
        items = fetch_all(session, SOURCE, None, {})
        show_list(SOURCE, items, output, with_namespace=False)
        return exits.OK
    found = session.fetch(SOURCE.path(name=name))
    if output == "json":
        print_json(found)
    elif output == "yaml":
        print_yaml(found)
    else:
        for line in _lines(found):
            print(clean(line))
    if objects and output in ("table", "wide"):
        items = fetch_all(session, CLAIM, None, {"fieldSelector": f"source={name}"})
        show_list(CLAIM, items, output, with_namespace=True)
    phase = found.get("status", {}).get("phase", "Pending")
    return exits.OK if phase in ("Synced", "Suspended", "Off") else exits.ERROR


@app.command()
def approve(
    context: typer.Context,
    name: SourceName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    digest: Annotated[
        str, typer.Option(help="Approve only if this is what is held back; does not ask.")
    ] = "",
) -> int:
    """Let deletions go that are held back. Shows them, and asks."""
    from bacalhau.cli.session import is_terminal
    from bacalhau.gitops.wire import ApproveRequest, verb
    from bacalhau_api.v1.source import Source

    with session_of(context).client() as client:
        freeze = client.get(Source, name, "").status.freeze
        if freeze is None or not freeze.digest:
            why = f": {clean(freeze.message)}" if freeze else ""
            exits.note(f"source/{clean(name)} holds nothing back that could be approved{why}")
            return exits.ERROR
        if not digest:
            exits.note(f"{freeze.reason}: {clean(freeze.message)}")
            for text in freeze.objects:
                exits.note(f"  delete {clean(text)}")
            if freeze.count > len(freeze.objects):
                exits.note(f"  and {freeze.count - len(freeze.objects)} more")
            if not yes:
                if not is_terminal():
                    raise exits.usage(
                        "approve", "needs a yes", hint=f"add --yes, or --digest {freeze.digest}"
                    )
                typer.confirm(f"Delete {freeze.count} objects?", abort=True, err=True)
        client.send(verb(name, "approve", ApproveRequest(digest=digest or freeze.digest)))
    print(f"source/{clean(name)} approved")
    return exits.OK


@app.command()
def suspend(
    context: typer.Context,
    name: SourceName,
    for_: Annotated[str, typer.Option("--for", help="How long, such as 2h. It ends by itself.")],
    reason: Annotated[str, typer.Option("--reason", "-m", help="Why.")] = "",
) -> None:
    """Apply nothing for a while."""
    from bacalhau.gitops.wire import SuspendRequest, verb
    from bacalhau_api.quantity import parse_seconds

    try:
        seconds = float(parse_seconds(for_))
    except ValueError as error:
        raise exits.usage("--for", str(error), for_[:80]) from error
    if not 0 < seconds <= 90 * 86400:
        raise exits.usage("--for", "must be more than nothing and at most 90 days", for_[:80])
    with session_of(context).client() as client:
        found = client.send(verb(name, "suspend", SuspendRequest(seconds=seconds, reason=reason)))
    until = found.spec.suspension.until if found.spec.suspension else None
    print(f"source/{clean(name)} suspended until {until:%Y-%m-%dT%H:%M:%SZ}")


@app.command()
def resume(context: typer.Context, name: SourceName) -> None:
    """End a suspension."""
    from bacalhau.gitops.wire import verb

    with session_of(context).client() as client:
        client.send(verb(name, "resume"))
    print(f"source/{clean(name)} resumed")


@app.command()
def restore(
    context: typer.Context,
    name: SourceName,
    words: Annotated[list[str], typer.Argument(metavar="JOB...")],
    namespace: Namespace = "default",
) -> int:
    """Bring back jobs that were pruned within a day. They stay until their file is back."""
    from bacalhau.cli.targets import job_name
    from bacalhau.gitops.wire import ObjectName
    from bacalhau.gitops.wire import restore as restore_call
    from bacalhau_api.errors import BacalhauError, UnavailableError

    code = exits.OK
    with session_of(context).client() as client:
        for word in words:
            job = job_name(word)
            try:
                client.send(restore_call(name, ObjectName(namespace=namespace, name=job)))
            except UnavailableError:
                raise
            except BacalhauError as error:
                exits.tell(error)
                code = code or exits.code_of(error)
            else:
                print(f"job/{clean(job)} restored")
    return code


def _request(
    mode: str,
    prune: str,
    max_prune: int | None,
    view: str,
    settle: float | None,
    ignore: list[str] | None,
    namespace: str,
) -> Any:
    """What was said; the rest stays as it is."""
    from bacalhau.gitops.wire import SourceRequest

    given: dict[str, object] = {
        "mode": check_choice(mode, _MODES, "--mode") if mode else None,
        "prune": check_choice(prune, _RULES, "--prune") if prune else None,
        "max_prune_percent": max_prune,
        "view": check_choice(view, _VIEWS, "--view") if view else None,
        "settle_seconds": settle,
        "ignore": tuple(ignore) if ignore is not None else None,
        "namespace": namespace or None,
    }
    return SourceRequest(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]


def _lines(found: dict[str, Any]) -> list[str]:
    """One source, for people."""
    about, spec = found.get("status", {}), found.get("spec", {})
    counts = about.get("counts", {})
    lines = [
        f"Source:     {found['metadata']['name']}",
        f"Mode:       {spec.get('mode', 'enforce')}",
        f"Phase:      {about.get('phase', 'Pending')}",
        f"Message:    {about.get('message') or 'no runner has looked at it yet'}",
        f"Directory:  {about.get('path') or '-'} ({about.get('runner') or 'no runner'})",
        f"Seen:       {about.get('revisionSeen') or '-'}",
        f"Applied:    {about.get('revisionApplied') or '-'} {about.get('appliedAt', '')}".rstrip(),
        f"Objects:    {counts.get('objects', 0)} in {counts.get('files', 0)} files",
    ]
    stands = ("synced", "waiting", "failed", "drifted")
    lines.append("            " + ", ".join(f"{counts.get(word, 0)} {word}" for word in stands))
    freeze = about.get("freeze")
    if freeze:
        lines.append(f"Held back:  {freeze.get('count', 0)} deletions ({freeze['reason']})")
        lines += [f"  {text}" for text in freeze.get("objects", ())]
        if freeze.get("digest"):
            lines.append(f"  to let them go: bacalhau gitops approve {found['metadata']['name']}")
    problems = about.get("problems", ())
    if problems:
        lines.append(f"Problems:   {about.get('problemsTotal', len(problems))}")
    for problem in problems:
        where = f"{problem.get('file', '')}:{problem.get('line') or ''}".rstrip(":")
        hint = f"; {problem['hint']}" if problem.get("hint") else ""
        lines.append(f"  {where}: {problem['message']}{hint}")
    for drift in about.get("drift", ()):
        fields = ", ".join(drift.get("fields", ()))
        lines.append(f"  {drift['action']} {drift['object']} ({drift.get('file', '')}) {fields}")
    return lines


def _tell(problem: Any) -> None:
    where = f"{problem.file}:{problem.line}" if problem.line else problem.file
    hint = f"; {problem.hint}" if problem.hint else ""
    exits.note(f"error: {where}: {problem.message}{hint}")
