"""Request bodies: which content types are understood, and what comes out of them."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from bacalhau.server.problems import ApiError, from_validation, render
from bacalhau_api.base import Model
from bacalhau_api.errors import InvalidError, Problem
from bacalhau_api.jobfile import Document, parse_manifests
from bacalhau_api.meta import DEFAULT_NAMESPACE, Resource

MANIFEST_TYPES = (
    "application/json",
    "application/yaml",
    "application/x-yaml",
    "text/yaml",
    "application/apply-patch+yaml",
)

R = TypeVar("R", bound=Resource)
M = TypeVar("M", bound=Model)


def manifest_body(schema: str) -> dict[str, Any]:
    """The OpenAPI description of a body that is a manifest in any of the content types."""
    ref = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    text = {"schema": {"type": "string"}}
    content = {kind: ref if "json" in kind else text for kind in MANIFEST_TYPES}
    return {"requestBody": {"required": True, "content": content}}


def json_body(schema: Mapping[str, Any], *, required: bool) -> dict[str, Any]:
    """The OpenAPI description of a small JSON body."""
    content = {"application/json": {"schema": dict(schema)}}
    return {"requestBody": {"required": required, "content": content}}


async def read_manifest(
    request: Request,
    kind: type[R],
    *,
    namespace: str | None,
    name: str | None,
    default_name: str = "",
) -> tuple[R, tuple[str, ...]]:
    """The one manifest of the body, and warnings about it. Name and namespace of the path are
    filled in where the manifest leaves them out; `default_name` where the path has none.
    Raises InvalidError, ApiError (415)."""
    _check_type(request, MANIFEST_TYPES)
    documents = parse_manifests(
        await request.body(), source="<body>", default_name=name or default_name
    )
    if len(documents) != 1:
        message = f"holds {len(documents)} documents, where one is expected"
        raise InvalidError([Problem("", f"the body {message}")])
    return _placed(documents[0], kind, namespace, name), documents[0].warnings


def _placed(document: Document, kind: type[R], namespace: str | None, name: str | None) -> R:
    item = document.resource
    wanted = kind.model_fields["kind"].default
    if not isinstance(item, kind):
        raise InvalidError([Problem("kind", f"must be {wanted} here", render(item.kind))])
    meta = item.metadata
    problems = []
    if name is not None and meta.name not in ("", name):
        hint = f"the path says {render(name)}"
        problems.append(Problem("metadata.name", "differs from the path", render(meta.name), hint))
    if namespace is not None and meta.namespace not in ("", DEFAULT_NAMESPACE, namespace):
        given, hint = render(meta.namespace), f"the path says {render(namespace)}"
        problems.append(Problem("metadata.namespace", "differs from the path", given, hint))
    if problems:
        raise InvalidError(problems)
    return item.with_meta(
        name=name if name is not None else meta.name,
        namespace=namespace if namespace is not None else meta.namespace,
    )


async def read_json(request: Request, model: type[M], *, required: bool = True) -> M:
    """A small JSON body. An absent one that is not required is like `{}`."""
    body = await request.body()
    if not body and not required:
        body = b"{}"
    else:
        _check_type(request, ("application/json",))
    try:
        json.loads(body)  # pydantic's message for broken JSON names no line
        return model.decode(body)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False)) from error
    except (ValueError, RecursionError) as error:
        raise InvalidError([Problem("", f"the body is not JSON: {error}"[:300])]) from error


def _check_type(request: Request, known: tuple[str, ...]) -> None:
    given = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if given not in known:
        raise ApiError(
            415,
            "UnsupportedMediaType",
            f"the Content-Type {render(given)} is not understood here"
            if given
            else "the request has no Content-Type",
            hint=f"use one of {', '.join(known)}",
        )
