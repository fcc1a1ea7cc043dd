"""`get`: objects as tables, or as data for programs."""

from datetime import UTC
from typing import Annotated, Any

import typer

from bacalhau.cli.columns import LOCAL_EXECUTION, Column, columns_of, dig, rows
from bacalhau.cli.options import (
    OUTPUTS,
    AllNamespaces,
    Namespace,
    OutputDefault,
    Words,
    check_choice,
    session_of,
)
from bacalhau.cli.session import Session, print_json, print_yaml
from bacalhau.cli.targets import Target, parse_targets
from bacalhau.cli.text import clean, now, parse_time, table
from bacalhau.kinds import EXECUTION, PUBLICATION, KindNames

PAGE_ITEMS = 1000


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def get(
        context: typer.Context,
        words: Words,
        output: OutputDefault = "table",
        selector: Annotated[
            str, typer.Option("--selector", "-l", help="Labels, such as team=data,!old.")
        ] = "",
        field_selector: Annotated[
            str, typer.Option(help="Fields, such as phase=Running,node=edge-1.")
        ] = "",
        sort: Annotated[str, typer.Option(help="name or created; -name, -created.")] = "name",
        namespace: Namespace = "default",
        all_namespaces: AllNamespaces = False,
        at: Annotated[
            str, typer.Option(help="As named objects were then, such as 2026-01-31T12:00:00Z.")
        ] = "",
        watch: Annotated[bool, typer.Option("--watch", "-w", help="Show changes.")] = False,
    ) -> None:
        """Show objects: jobs, executions, nodes, namespaces, sources, publications, acceptances,
        manifests, retiredjobs, claims."""
        check_choice(output, OUTPUTS, "--output")
        session = session_of(context)
        where = None if all_namespaces else namespace
        params = {"labelSelector": selector, "fieldSelector": field_selector, "sort": sort}
        targets = parse_targets(words)
        past = {"at": _moment(at)} if at else {}
        if past and (watch or not targets[0].name):
            raise typer.BadParameter("is for objects that are named", param_hint="--at")
        if watch:
            _watch(session, targets, where, selector, field_selector, output)
            return
        if targets[0].name:
            items = [session.fetch(t.kind.path(namespace, t.name), past) for t in targets]
            _show_named(targets, items, output)
            return
        kind = targets[0].kind
        items = fetch_all(session, kind, where, params)
        if kind == EXECUTION and output == "wide" and not session.is_local:
            add_publications(session, items, where)
        show_list(kind, items, output, with_namespace=all_namespaces)


def _moment(text: str) -> str:
    """A time as the API takes it: in UTC where no zone is given. Raises a usage error."""
    moment = parse_time(text)
    if moment is None:
        raise typer.BadParameter(
            f"{text!r} is not a time such as 2026-01-31T12:00:00Z", param_hint="--at"
        )
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat()


def fetch_all(
    session: Session, kind: KindNames, namespace: str | None, params: dict[str, str]
) -> list[Any]:
    """All objects of a kind, page by page, as plain data."""
    asked = {key: value for key, value in params.items() if value} | {"limit": str(PAGE_ITEMS)}
    items: list[Any] = []
    while True:
        page = session.fetch(kind.path(namespace), asked)
        items += page["items"]
        token = page["metadata"].get("continue", "")
        if not token:
            return items
        asked["continue"] = token


def add_publications(session: Session, items: list[Any], namespace: str | None) -> None:
    """Put beside each execution the publication of its outputs, if it has one."""
    if not any(dig(item, "spec.task.publisher", None) for item in items):
        return
    found = {
        (dig(one, "metadata.namespace"), dig(one, "metadata.name")): one
        for one in fetch_all(session, PUBLICATION, namespace, {})
    }
    for item in items:
        one = found.get((dig(item, "metadata.namespace"), dig(item, "metadata.name")))
        if one is not None:
            item["publication"] = one


def show_list(kind: KindNames, items: list[Any], output: str, *, with_namespace: bool) -> None:
    """Print many objects of one kind."""
    if output in ("json", "yaml"):
        data = {"apiVersion": "bacalhau.org/v1", "kind": "List", "items": items}
        print_json(data) if output == "json" else print_yaml(data)
    elif output == "name":
        for item in items:
            print(f"{kind.singular}/{clean(item['metadata']['name'])}")
    elif not items:
        typer.echo(f"no {kind.plural} found", err=True)
    else:
        is_local = kind == EXECUTION and "local" in items[0]
        columns = columns_of(
            LOCAL_EXECUTION if is_local else kind.kind,
            wide=output == "wide",
            with_namespace=with_namespace and kind.namespaced,
        )
        for line in table([header for header, _ in columns], rows(columns, items, now())):
            print(line)


def _show_named(targets: list[Target], items: list[Any], output: str) -> None:
    if output in ("json", "yaml") and len(items) == 1:
        print_json(items[0]) if output == "json" else print_yaml(items[0])
        return
    if output in ("json", "yaml"):
        show_list(targets[0].kind, items, output, with_namespace=False)
        return
    kinds = list(dict.fromkeys(target.kind for target in targets))
    for number, kind in enumerate(kinds):
        if number and output != "name":
            print()
        mine = [item for t, item in zip(targets, items, strict=True) if t.kind == kind]
        show_list(kind, mine, output, with_namespace=False)


def _watch(
    session: Session,
    targets: list[Target],
    namespace: str | None,
    labels: str,
    fields: str,
    output: str,
) -> None:
    from bacalhau_api.v1 import KINDS

    if len(targets) != 1:
        raise typer.BadParameter("--watch takes one kind, or one object")
    target = targets[0]
    named = f"name={target.name}" if target.name else ""
    fields = ",".join(part for part in (fields, named) if part)
    columns = columns_of(
        target.kind.kind,
        wide=output == "wide",
        with_namespace=namespace is None and target.kind.namespaced,
    )
    printer = _RowPrinter(columns)
    with session.client() as client:
        updates = client.watch(
            KINDS[target.kind.kind], namespace=namespace, labels=labels, fields=fields
        )
        for update in updates:
            if update.item is None:
                continue
            data = update.item.model_dump(mode="json", by_alias=True, exclude_none=True)
            if output in ("json", "yaml"):
                shown = {"type": update.type, "object": data}
                if output == "json":
                    import json

                    print(json.dumps(shown), flush=True)
                else:
                    print("---")
                    print_yaml(shown)
            elif output == "name":
                print(f"{target.kind.singular}/{clean(update.item.name)}", flush=True)
            else:
                printer.print(data, is_gone=update.type == "DELETED")


class _RowPrinter:
    """Prints rows as they come: a column is as wide as it was in its widest row so far."""

    def __init__(self, columns: tuple[Column, ...]) -> None:
        self._columns = columns
        self._widths = [max(len(header), 8) for header, _ in columns]
        self._has_header = False

    def print(self, item: Any, *, is_gone: bool) -> None:
        """One row."""
        if not self._has_header:
            self._line([header for header, _ in self._columns])
            self._has_header = True
        (cells,) = rows(self._columns, [item], now())
        self._line([clean(cell) for cell in cells] + (["(deleted)"] if is_gone else []))

    def _line(self, cells: list[str]) -> None:
        self._widths = [
            max(width, len(cell)) for width, cell in zip(self._widths, cells, strict=False)
        ]
        padded = [
            cell.ljust(self._widths[i]) if i < len(self._widths) else cell
            for i, cell in enumerate(cells)
        ]
        print("  ".join(padded).rstrip(), flush=True)
