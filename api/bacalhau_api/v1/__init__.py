"""Version 1 of every kind, and the registry that decodes any of them."""

import re
from typing import Final

from pydantic_core import from_json

from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.meta import Resource
from bacalhau_api.v1.execution import Acceptance, Execution, Publication
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.manifest import Manifest, ManifestPart
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node
from bacalhau_api.v1.retired import RetiredJob
from bacalhau_api.v1.source import Claim, Source
from bacalhau_api.v1.token import JoinToken

KINDS: Final[dict[str, type[Resource]]] = {
    "Job": Job,
    "Execution": Execution,
    "Node": Node,
    "Publication": Publication,
    "Acceptance": Acceptance,
    "JoinToken": JoinToken,
    "Manifest": Manifest,
    "ManifestPart": ManifestPart,
    "Namespace": Namespace,
    "RetiredJob": RetiredJob,
    "Source": Source,
    "Claim": Claim,
}


# What `Resource.encode` begins with. Reading the kind from here spares parsing the text twice.
_HEAD = re.compile(rb'\{"apiVersion":"[^"\\]*","kind":"([A-Za-z]+)"')


def decode_resource(text: str | bytes) -> Resource:
    """Decode an object of any known kind from JSON, such as `Resource.encode` wrote.

    Raises InvalidError for what is not a JSON object of a known kind, pydantic.ValidationError for
    a malformed object.
    """
    data = text.encode() if isinstance(text, str) else text
    kind: object
    if head := _HEAD.match(data):
        kind = head[1].decode()
    else:
        kind = _parsed_kind(data)
    model = KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        known = ", ".join(KINDS)
        shown = ascii(kind)[:60]
        raise InvalidError([Problem("kind", "is not a known kind", shown, f"use one of {known}")])
    return model.decode(data)


def _parsed_kind(data: bytes) -> object:
    try:
        parsed = from_json(data)
    except ValueError as error:
        raise InvalidError([Problem("", f"is not valid JSON: {error}")]) from None
    if not isinstance(parsed, dict):
        raise InvalidError([Problem("", "must be a JSON object", hint="with apiVersion and kind")])
    return parsed.get("kind")


__all__ = [
    "KINDS",
    "Acceptance",
    "Claim",
    "Execution",
    "Job",
    "JoinToken",
    "Manifest",
    "ManifestPart",
    "Namespace",
    "Node",
    "Publication",
    "RetiredJob",
    "Source",
    "decode_resource",
]
