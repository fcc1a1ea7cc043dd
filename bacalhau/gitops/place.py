"""Which directory is meant, and what its source is called."""

import re
from pathlib import Path

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import NAME_LENGTH_MAX, check_name


def parse_place(text: str, option: str = "--gitops") -> tuple[str, Path]:
    """Name and directory from `NAME=DIR`, or from `DIR` alone, which is then named after its last
    part. Raises InvalidError."""
    name, sign, path = text.partition("=")
    if not sign or "/" in name:
        name, path = "", text
    if not path:
        raise InvalidError([Problem(option, "names no directory", text[:200], "[NAME=]DIR")])
    root = Path(path).expanduser().absolute()
    if not name:
        name = default_name(root)
    try:
        return check_name(name), root
    except ValueError as error:
        hint = "name the source: NAME=DIR"
        raise InvalidError([Problem(option, str(error), text[:200], hint)]) from error


def default_name(root: Path) -> str:
    """What a source is called after its directory, such as `fleet` for `/srv/fleet.git`."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", root.resolve().name.removesuffix(".git"))
    return text.strip("-._")[:NAME_LENGTH_MAX].rstrip("-._")
