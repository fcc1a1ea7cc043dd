"""`plan`, `diff`, `simulate`: what would happen."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from bacalhau.cli import exits
from bacalhau.cli.completing import complete_targets
from bacalhau.cli.options import Namespace, check_choice, session_of
from bacalhau.cli.session import print_json, print_yaml
from bacalhau.cli.targets import parse_named
from bacalhau.cli.text import clean

if TYPE_CHECKING:
    from bacalhau.replies import RevisionDiff, SetRequest
    from bacalhau_api.plans import ChangePlan, ObjectPlan

_Files = Annotated[
    list[Path] | None,
    typer.Option("--file", "-f", help="A file, a directory, or - for standard input."),
]
_Recursive = Annotated[
    bool, typer.Option("--recursive", "-R", help="Directories within directories, too.")
]
_Output = Annotated[str, typer.Option("--output", "-o", help="text, json or yaml.")]

SOURCE_MAX: Final = 1024
"""Characters of a path that the server takes."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(plan)
    app.command()(diff)
    app.command()(simulate)


def plan(
    context: typer.Context,
    file: _Files = None,
    recursive: _Recursive = False,
    namespace: Namespace = "default",
    output: _Output = "text",
    unchanged: Annotated[
        bool, typer.Option("--unchanged", help="List objects that stay as they are, too.")
    ] = False,
) -> int:
    """Show what would happen if files were applied: what changes field by field, what starts,
    stops, restarts and runs again, where and why not. Nothing is stored.

    It ends in a token: `apply --plan TOKEN` does exactly this, or refuses. Exit codes: 0 nothing
    would change, 2 something would, 1 an error.
    """
    check_choice(output, ("text", "json", "yaml"), "--output")
    asked = read_set(file or [], recursive=recursive, namespace=namespace)
    with session_of(context).client() as client:
        made = client.plan(asked)
    if output != "text":
        data = made.model_dump(mode="json", by_alias=True)
        print_json(data) if output == "json" else print_yaml(data)
        return code_of(made)
    for line in plan_lines(made, unchanged=unchanged):
        print(line)
    if made.token and made.changes:
        words = " ".join(f"-f {path}" for path in file or [])
        exits.note(f"to do exactly this: bacalhau apply {words} --plan {made.token}")
    return code_of(made)


def diff(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KIND NAME | KIND/NAME]", autocompletion=complete_targets),
    ] = None,
    file: _Files = None,
    recursive: _Recursive = False,
    namespace: Namespace = "default",
    from_: Annotated[
        str, typer.Option("--from", help="A revision of the object, or gN: generation N.")
    ] = "",
    to: Annotated[str, typer.Option(help="The same; default: the newest.")] = "",
    output: _Output = "text",
) -> int:
    """Show which fields files would change; or, of one object, what differs between two revisions.

    Both sides are in canonical form with all defaults. Exit codes: 0 no difference, 2 some, 1 an
    error.
    """
    check_choice(output, ("text", "json", "yaml"), "--output")
    if bool(words) == bool(file):
        raise exits.usage("diff", "takes files with -f, or one object with --from", hint="see -h")
    if words:
        if not from_:
            hint = "see the revisions: bacalhau history KIND/NAME"
            raise exits.usage("--from", "is missing", hint=hint)
        return _diff_past(context, words, namespace, from_, to, output)
    asked = read_set(file or [], recursive=recursive, namespace=namespace)
    with session_of(context).client() as client:
        made = client.plan(asked)
    if output != "text":
        data = [_fields(item) for item in made.objects if item.action != "affected"]
        print_json(data) if output == "json" else print_yaml(data)
    else:
        for line in diff_lines(made):
            print(line)
    return code_of(made)


def simulate(
    context: typer.Context,
    without: Annotated[
        list[str],
        typer.Option(
            "--without",
            help="A node that is lost, such as node/edge-1.",
            autocompletion=complete_targets,
        ),
    ],
    output: _Output = "text",
) -> int:
    """Show what would happen without some nodes: what is given up when, what starts elsewhere,
    what has to wait. Nothing is stopped.

    Exit codes: 0 nothing would happen, 2 something would, 1 an error.
    """
    check_choice(output, ("text", "json", "yaml"), "--output")
    with session_of(context).client() as client:
        made = client.simulate(without)
    if output != "text":
        data = made.model_dump(mode="json", by_alias=True)
        print_json(data) if output == "json" else print_yaml(data)
        return code_of(made)
    for line in plan_lines(made, unchanged=False):
        print(line)
    return code_of(made)


def code_of(made: "ChangePlan") -> int:
    """The exit code of a plan."""
    if made.summary.refused:
        return exits.ERROR
    return exits.CHANGES if made.changes else exits.OK


def read_set(files: list[Path], *, recursive: bool, namespace: str) -> "SetRequest":
    """The files as a request. Everything is read and checked here first, so that what is wrong is
    said with its line."""
    from bacalhau.cli.files import read_documents, read_texts
    from bacalhau.cli.origin import origin_of
    from bacalhau.replies import DocumentText, SetRequest
    from bacalhau_api.errors import InvalidError, Problem

    if not files:
        raise exits.usage("-f", "is missing", hint="give a file, a directory, or - for stdin")
    texts = read_texts(files, recursive=recursive)
    if not read_documents(files, recursive=recursive, namespace=namespace, texts=texts):
        raise InvalidError([Problem("-f", "holds no objects")])
    documents = []
    origin = None
    for source, text in texts:
        origin = origin_of(source)
        documents.append(
            DocumentText(
                text=text.decode("utf-8", "surrogateescape"), source=origin.source[-SOURCE_MAX:]
            )
        )
    assert origin is not None
    shared = origin.but(source="")
    return SetRequest(documents=tuple(documents), namespace=namespace, provenance=shared)


def plan_lines(made: "ChangePlan", *, unchanged: bool) -> list[str]:
    """A plan for people."""
    from bacalhau_api import planwords

    lines: list[str] = []
    for item in made.objects:
        if item.action == "none" and not unchanged and not item.run:
            continue
        lines.append(planwords.head_line(item))
        if item.why and item.action not in ("refused", "none"):
            lines.append(f"    why: {item.why}")
        lines += [f"    {line}" for line in planwords.field_lines(item)]
        lines += [f"    {line}" for line in planwords.effect_lines(item)]
        lines += [f"    {line}" for line in planwords.remark_lines(item)]
        lines += [f"    warning: {text}" for text in item.warnings]
    lines.append(planwords.summary_line(made))
    if not made.complete:
        lines.append("there is more of the same: the forecast was cut off")
    return [clean(line) for line in lines]


def diff_lines(made: "ChangePlan") -> list[str]:
    """The short form: heads and fields."""
    from bacalhau_api import planwords

    lines: list[str] = []
    for item in made.objects:
        if item.action in ("none", "affected") and not item.run:
            continue
        lines.append(planwords.head_line(item))
        lines += [f"    {line}" for line in planwords.field_lines(item)]
        if item.action == "refused":
            lines += [f"    {line}" for line in planwords.effect_lines(item)]
    return [clean(line) for line in lines]


def _fields(item: "ObjectPlan") -> dict[str, Any]:
    keep = ("action", "kind", "namespace", "name", "source", "line", "run", "fields", "problems")
    data = item.model_dump(mode="json", by_alias=True)
    return {name: data[name] for name in keep}


def _diff_past(
    context: typer.Context, words: list[str], namespace: str, from_: str, to: str, output: str
) -> int:
    from bacalhau_api.v1 import KINDS

    targets = parse_named(words)
    if len(targets) != 1:
        raise exits.usage("diff", "compares revisions of one object", hint="name one")
    target = targets[0]
    with session_of(context).client() as client:
        found = client.diff(KINDS[target.kind.kind], target.name, from_, to, namespace)
    if output != "text":
        data = found.model_dump(mode="json", by_alias=True)
        print_json(data) if output == "json" else print_yaml(data)
    else:
        for line in revision_lines(found):
            print(line)
    return exits.CHANGES if found.fields else exits.OK


def revision_lines(found: "RevisionDiff") -> list[str]:
    """What differs, for people."""
    from bacalhau_api.compare import render

    name = f"{found.kind.lower()}/{found.name}"
    lines = [f"{name}: revision {found.from_} -> {found.to}"]
    lines += [f"    {f.field}: {render(f.old)} -> {render(f.new)}" for f in found.fields]
    if not found.fields:
        lines.append("    no difference in what users say of it")
    return [clean(line) for line in lines]
