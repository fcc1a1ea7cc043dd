"""Reads manifests: files, request bodies, whatever holds `kind: Job` and `kind: Node` documents or
jobs in the flat form, in YAML or JSON.

    documents = parse_manifests(text, source="job.yaml")

Everything wrong in all documents is reported at once, with source and line. What only the server
may set is dropped with a warning, so that the output of `get -o yaml` can be applied again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from bacalhau_api.canonical import settle
from bacalhau_api.flatjob import to_manifest, unwrap
from bacalhau_api.meta import API_VERSION, Resource
from bacalhau_api.names import RESERVED_KEY_PREFIX, is_reserved
from bacalhau_api.quantity import to_quantities
from bacalhau_api.shape import Findings, nearest
from bacalhau_api.tree import Fields, Items, Node, Scalar, is_null, shown
from bacalhau_api.v1 import KINDS
from bacalhau_api.v1.job import Job
from bacalhau_api.v1.namespace import Namespace
from bacalhau_api.v1.node import Node as NodeResource
from bacalhau_api.yamlsafe import DOCUMENTS_MAX, read_documents

APPLIABLE: Final[dict[str, type[Resource]]] = {
    "Job": Job,
    "Namespace": Namespace,
    "Node": NodeResource,
}
"""The kinds that users write; the others are written by controllers."""

SERVER_METADATA: Final = (
    "uid", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp", "finalizers",
    "ownerReferences",
)  # fmt: skip
_RESOURCE_HOLDERS: Final = ("task", "defaults", "quota")
SERVER_SPEC: Final = ("stopGeneration", "rerunNonce", "retryNonce")
_MANIFEST_KEYS: Final = frozenset({"apiversion", "kind", "metadata", "spec"})


@dataclass(frozen=True, slots=True)
class Document:
    """One object from an input, in canonical form. `line` counts from 1; 0 where it is not known
    (JSON)."""

    resource: Resource
    warnings: tuple[str, ...]
    source: str
    line: int


def parse_manifests(
    text: str | bytes, *, source: str = "<input>", default_name: str = ""
) -> tuple[Document, ...]:
    """Read, check and canonicalise all documents of an input.

    `default_name` names a job whose document does not. Raises InvalidError with at most 20
    problems, in the order of the lines; never anything else, whatever the input.
    """
    findings = Findings(source)
    documents: list[Document] = []
    roots = list(islice(_documents(read_documents(text, source), findings), DOCUMENTS_MAX + 1))
    if len(roots) > DOCUMENTS_MAX:
        message = f"is one more than the {DOCUMENTS_MAX} documents that are read"
        findings.add(roots.pop(), message, hint="split the input")
    for root in roots:
        if findings.is_full:
            break
        findings.warnings = []
        resource = _read(root, findings, default_name)
        if resource is not None:
            warnings = tuple(findings.warnings)
            documents.append(Document(resource, warnings, source, root.line))
    _check_repeated(documents, findings)
    findings.check()
    return tuple(documents)


def _documents(roots: list[Node], findings: Findings) -> Iterator[Fields]:
    """The mappings among the documents, with lists (`kind: List`) opened up."""
    for root in roots:
        if findings.is_full:
            return
        if isinstance(root, Fields) and _text_of(root, "kind") == "List":
            items = root.entries.get("items")
            if isinstance(items, Items) and items.items:
                yield from _documents(items.items, findings)
            else:
                findings.add(items or root, "the list has no items")
        elif isinstance(root, Fields):
            yield root
        else:
            hint = "write apiVersion, kind, metadata and spec"
            findings.add(root, "a document must be a mapping", value=shown(root), hint=hint)


def _text_of(fields: Fields, key: str) -> str:
    node = fields.entries.get(key)
    return node.text if isinstance(node, Scalar) and not is_null(node) else ""


def _read(root: Fields, findings: Findings, default_name: str) -> Resource | None:
    if not any(key.lower() in _MANIFEST_KEYS for key in root.entries):
        manifest, misspelt = to_manifest(unwrap(root), findings)
        _clean(manifest, findings, Job)
        _name(manifest, default_name)
        return settle(manifest, Job, findings, is_flat=True, misspelt=misspelt)
    model = _kind_of(root, findings)
    if model is None:
        return None
    _clean(root, findings, model)
    if model is Job:
        _name(root, default_name)
    return settle(root, model, findings)


def _kind_of(root: Fields, findings: Findings) -> type[Resource] | None:
    """The type of a manifest; None if it has no usable kind and version."""
    kind, version = root.entries.get("kind"), root.entries.get("apiVersion")
    written = _text_of(root, "kind")
    model = APPLIABLE.get(written)
    for name, node, example in (("apiVersion", version, API_VERSION), ("kind", kind, "Job")):
        if node is None or is_null(node):
            findings.add(root, "is missing", below=name, hint=f"write {name}: {example}")
        elif not _text_of(root, name) and model is None:
            findings.add(node, "must be text", value=shown(node), hint=f"write {name}: {example}")
    if written and model is None and kind is not None:
        known = written in KINDS
        message = "is written by controllers and cannot be applied" if known else "is not a kind"
        hint = f"use one of {', '.join(APPLIABLE)}" if known else nearest(written, APPLIABLE)
        findings.add(kind, message, value=shown(kind), hint=hint)
    return model


def _name(manifest: Fields, default_name: str) -> None:
    metadata = manifest.entries.get("metadata")
    if not default_name or (metadata is not None and not isinstance(metadata, Fields | Scalar)):
        return
    if not isinstance(metadata, Fields):
        metadata = Fields(manifest.line)
        manifest.put("metadata", metadata)
    if not _text_of(metadata, "name"):
        metadata.entries["name"] = Scalar(default_name, default_name)


def _clean(manifest: Fields, findings: Findings, model: type[Resource]) -> None:
    """Drop what only the server may set, with warnings."""
    metadata, spec = manifest.entries.get("metadata"), manifest.entries.get("spec")
    dropped = _drop(manifest, ("status",))
    if isinstance(metadata, Fields):
        own = () if model.namespaced else ("namespace",)
        dropped += _drop(metadata, (*SERVER_METADATA, *own))
        for name in ("labels", "annotations"):
            _drop_reserved(metadata.entries.get(name), findings)
    if isinstance(spec, Fields) and model is Job:
        dropped += _drop(spec, SERVER_SPEC)
        _drop_reserved(spec.entries.get("meta"), findings)
    if dropped:
        verb = "was" if len(dropped) == 1 else "were"
        findings.warn(f"{', '.join(dropped)} {verb} ignored: only the server sets this")


def _drop(fields: Fields, names: tuple[str, ...]) -> list[str]:
    """Remove fields; return the paths of those that held anything."""
    found = [fields.entries.pop(name) for name in names if name in fields.entries]
    return [node.path for node in found if not is_null(node)]


def _drop_reserved(node: Node | None, findings: Findings) -> None:
    if not isinstance(node, Fields):
        return
    reserved = [key for key in node.entries if is_reserved(key)]
    for key in reserved:
        del node.entries[key]
    if reserved:
        findings.warn(
            f"{node.path}: keys beginning with {RESERVED_KEY_PREFIX} belong to the system "
            "and were ignored"
        )


def _check_repeated(documents: list[Document], findings: Findings) -> None:
    """The same object twice in one input: only one of them could be meant."""
    first: dict[object, Document] = {}
    for document in documents:
        ref = document.resource.ref
        other = first.setdefault(ref, document)
        if other is not document:
            where = f", first on line {other.line}" if other.line else ""
            node = Scalar("", "", document.line)
            findings.add(node, f"{ref} is given twice{where}", hint="keep one of the two")


def to_document(resource: Resource) -> dict[str, object]:
    """An object as plain data for people: as on the wire, with resources as short quantities.

    `parse_manifests` reads it back.
    """
    wire = resource.wire()
    spec, status = wire.get("spec", {}), wire.get("status", {})
    holders = [*spec.get("tasks", ()), *(spec.get(name, {}) for name in _RESOURCE_HOLDERS)]
    for holder in holders:
        if "resources" in holder:
            holder["resources"] = to_quantities(holder["resources"])
    info = status.get("info", {}) if isinstance(status, dict) else {}
    if "capacity" in info:
        info["capacity"] = to_quantities(info["capacity"])
    return wire
