"""Version 1 of every kind, and the registry that decodes any of them."""

import json
from typing import Any, Final

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Resource
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.token import JoinToken

KINDS: Final[dict[str, type[Resource]]] = {
    "Job": Job,
    "Execution": Execution,
    "Node": Node,
    "Publication": Publication,
    "Acceptance": Acceptance,
    "JoinToken": JoinToken,
}


def decode_resource(text: str | bytes) -> Resource:
    """Decode an object of any known kind from the JSON that `Resource.encode` wrote.

    Raises InvalidError for an unknown kind, pydantic.ValidationError for a malformed object.
    """
    kind: Any = json.loads(text).get("kind")
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise InvalidError([Problem("kind", "is not a known kind", repr(kind), f"use one of {known}")])
    return KINDS[kind].decode(text)


__all__ = ["KINDS", "Acceptance", "Execution", "Job", "JoinToken", "Node", "Publication", "decode_resource"]
