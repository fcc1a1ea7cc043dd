"""What a directory says, read independently of the code under test."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

IGNORE_FILE = ".bacalhauignore"


@dataclass(frozen=True, slots=True)
class State:
    """One moment: the value and the label of each job. A value of None stands for a name that is
    declared, but not how; `is_whole`: everything could be read."""

    values: dict[str, str | None] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    is_whole: bool = True


def manifest_files(root: Path) -> Iterator[str]:
    """The manifests that count, by relative path."""
    ignored = set()
    if (root / IGNORE_FILE).is_file():
        ignored = {line.lstrip("/") for line in (root / IGNORE_FILE).read_text().splitlines()}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        is_hidden = any(part.startswith(".") for part in name.split("/"))
        if path.suffix == ".yaml" and not is_hidden and name not in ignored and path.is_file():
            yield name


def documents(text: str) -> list[tuple[str, str, str]] | None:
    """Name, value and label of each job of a file; None if it cannot be read."""
    if not text.strip():
        return None
    try:
        found = [item for item in yaml.safe_load_all(text) if item is not None]
        return [
            (
                item["metadata"]["name"],
                item["spec"]["tasks"][0]["env"]["VALUE"],
                item["metadata"]["labels"]["team"],
            )
            for item in found
        ]
    except (yaml.YAMLError, KeyError, TypeError):
        return None


def read(root: Path) -> State:
    """The directory as it lies there now."""
    values: dict[str, str | None] = {}
    labels: dict[str, str] = {}
    is_whole = root.is_dir()
    for path in manifest_files(root) if is_whole else ():
        declared = documents((root / path).read_text())
        if declared is None:
            is_whole = False
            continue
        for name, value, team in declared:
            values[name] = None if name in values else value
            labels[name] = team
    return State(values, labels, is_whole and bool(values))
