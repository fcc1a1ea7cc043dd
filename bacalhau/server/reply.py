"""How objects and lists become JSON answers.

The API shows every field with its effective value (the store leaves out what is at its default),
so that `status.phase` is always there for a script to read.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from bacalhau_api.base import Model
from bacalhau_api.meta import API_VERSION, Resource


def full_json(model: Model) -> bytes:
    """An object with its defaults; absent (None) fields are left out. Model.decode reads it."""
    return model.model_dump_json(by_alias=True, exclude_none=True).encode()


def object_response(model: Model, status: int = 200) -> Response:
    """One object."""
    return Response(full_json(model), status, media_type="application/json")


def data_response(data: Mapping[str, Any], status: int = 200) -> Response:
    """Anything else, made of JSON types."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str)
    body = text.encode("utf-8", "backslashreplace")
    return Response(body, status, media_type="application/json")


def list_response(
    kind: str, items: Sequence[Resource], resource_version: str, token: str, remaining: int
) -> Response:
    """A page of objects."""
    meta: dict[str, Any] = {"resourceVersion": resource_version}
    if token:
        meta |= {"continue": token, "remainingItemCount": remaining}
    head = json.dumps({"apiVersion": API_VERSION, "kind": f"{kind}List", "metadata": meta})
    body = b",".join(full_json(item) for item in items)
    whole = head[:-1].encode() + b', "items": [' + body + b"]}"
    return Response(whole, media_type="application/json")
