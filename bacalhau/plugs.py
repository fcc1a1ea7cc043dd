"""Finds engines, storages and publishers by entry point, and imports one when it is first used.

Entry points come from installed packages; in a source checkout, also from its pyproject.toml, so
that nothing need be installed to work on it. A name is looked up in any letter case.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from bacalhau_api.errors import TerminalError

Kind = Literal["engines", "storages", "publishers"]

_PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


@dataclass(frozen=True, slots=True)
class Plug:
    """One implementation: `value` is `module:attribute`, `package` who provides it."""

    kind: Kind
    name: str
    value: str
    package: str

    def load(self) -> object:
        """Import it. Raises TerminalError that names the missing package or the broken plug."""
        module, _, attribute = self.value.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise TerminalError(
                f"{self.kind[:-1]} {self.name} needs the Python package {error.name}, "
                "which is not installed",
                hint=f"pip install {error.name}",
                reason="PlugMissing",
            ) from error
        except (ImportError, AttributeError) as error:
            raise TerminalError(
                f"{self.kind[:-1]} {self.name} of package {self.package} is broken: {error}",
                reason="PlugBroken",
            ) from error


def plugs(kind: Kind) -> dict[str, Plug]:
    """All plugs of a kind, by name in lower case. Nothing is imported."""
    return dict(_discovered(kind))


def load(kind: Kind, name: str) -> object:
    """Import the named plug's class. Raises TerminalError if there is none."""
    known = _discovered(kind)
    plug = known.get(name.strip().lower())
    if plug is None:
        names = ", ".join(sorted(plug.name for plug in known.values())) or "none"
        raise TerminalError(
            f"there is no {kind[:-1]} named {name!r}; known: {names}", reason="PlugUnknown"
        )
    return plug.load()


@cache
def _discovered(kind: Kind) -> dict[str, Plug]:
    group = f"bacalhau.{kind}"
    found: dict[str, Plug] = {}
    for point in metadata.entry_points(group=group):
        package = point.dist.name if point.dist is not None else "?"
        found[point.name.lower()] = Plug(kind, point.name, point.value, package)
    for name, value in _checkout().get(group, {}).items():
        found[name.lower()] = Plug(kind, name, value, "bacalhau")
    return found


@cache
def _checkout() -> dict[str, dict[str, str]]:
    """The entry points in this checkout's pyproject.toml; none if this is an installation."""
    try:
        data = tomllib.loads(_PYPROJECT.read_text())
    except (OSError, tomllib.TOMLDecodeError):
        return {}
    project = data.get("project", {})
    if project.get("name") != "bacalhau":
        return {}
    points: dict[str, dict[str, str]] = project.get("entry-points", {})
    return points
