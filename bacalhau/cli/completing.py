"""What the Tab key offers beside commands and options: kinds, and names of objects.

Names are asked for of the server of the environment, for a moment only. Whatever goes wrong, there
is nothing to offer: a shell's prompt is no place for errors.
"""

import json
import os
from collections.abc import Sequence
from typing import Any, Final

from bacalhau.kinds import ALL, JOB, NODE, KindNames, find_kind

ANSWER_SECONDS: Final = 1.0
NAMES_MAX: Final = 500


def complete_jobs(ctx: Any, incomplete: str) -> list[str]:
    """Names of jobs."""
    return _matching(_names(JOB, ctx), incomplete)


def complete_nodes(ctx: Any, incomplete: str) -> list[str]:
    """Names of nodes."""
    return _matching(_names(NODE, ctx), incomplete)


def complete_targets(ctx: Any, incomplete: str) -> list[str]:
    """`KIND`, then names of that kind, or `KIND/NAME`."""
    word, slash, _ = incomplete.partition("/")
    kind = find_kind(word)
    if slash and kind is not None:
        return _matching([f"{word}/{name}" for name in _names(kind, ctx)], incomplete)
    before = [str(given) for given in ctx.params.get("words") or () if given != incomplete]
    first = find_kind(before[0]) if before and "/" not in before[0] else None
    if first is not None:
        return _matching(_names(first, ctx), incomplete)
    return _matching([name for kind in ALL for name in (kind.plural, kind.singular)], incomplete)


def _matching(names: Sequence[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def _names(kind: KindNames, ctx: Any) -> list[str]:
    from bacalhau.cli.plain import fetch
    from bacalhau.client.address import server_from

    namespace = str(ctx.params.get("namespace") or "default")
    token = os.environ.get("BACALHAU_TOKEN", "").strip()
    path, params = kind.path(namespace), {"limit": str(NAMES_MAX)}
    try:
        body = fetch(server_from(os.environ), path, params, token, seconds=ANSWER_SECONDS)
        return [str(item["metadata"]["name"]) for item in json.loads(body)["items"]]
    except Exception:  # noqa: BLE001 - see above
        return []
