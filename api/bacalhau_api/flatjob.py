"""Jobs in the flat form: `Name:, Type:, Tasks:` at the top level, in any letter case.

`to_manifest` rearranges such a tree into that of a `kind: Job` manifest. Each value keeps the place
at which it was written, so that errors name it as its user knows it. `from_job` writes a job in the
flat form. Both forms mean the same.
"""

from typing import Any, Final, NamedTuple

from bacalhau_api.meta import API_VERSION
from bacalhau_api.params import KNOWN, Role
from bacalhau_api.quantity import to_quantities
from bacalhau_api.shape import Findings, Loc, fields_of, nearest, suggested_by
from bacalhau_api.tree import Fields, Items, Node, Scalar, is_null
from bacalhau_api.v1.job import Job, JobSpec

_METADATA: Final = ("name", "namespace", "labels", "annotations")
_SERVER_OWNED: Final = {
    "id": "ID", "state": "State", "version": "Version", "revision": "Revision",
    "createtime": "CreateTime", "modifytime": "ModifyTime",
}  # fmt: skip
_SERVER_SPEC: Final = ("stopGeneration", "rerunNonce", "retryNonce")
_SPEC: Final = {name.lower(): name for name in fields_of(JobSpec) if name not in _SERVER_SPEC}
_SPELLINGS: Final = {
    "url": "URL", "cid": "CID", "versionId": "VersionID", "checksumSha256": "ChecksumSHA256",
    "cpu": "CPU", "gpu": "GPU",
}  # fmt: skip


def unwrap(root: Fields) -> Fields:
    """The job in a request envelope (`{"Job": {...}, "Namespace": …}`), or the root itself."""
    inner = root.find("Job")
    if not isinstance(inner, Fields) or any(
        key.lower() in ("tasks", "type") for key in root.entries
    ):
        return root
    outer = root.find("Namespace")
    own = inner.find("Namespace")
    if _has_text(outer) and not _has_text(own) and outer is not None:
        for key in [k for k in inner.entries if k.lower() == "namespace"]:
            del inner.entries[key]
        inner.entries["Namespace"] = outer
    return inner


class Flattened(NamedTuple):
    """A manifest made of a flat job, and the places of fields that unknown ones seem to mean."""

    manifest: Fields
    misspelt: frozenset[Loc]


def to_manifest(root: Fields, findings: Findings) -> Flattened:
    """The tree of the manifest that means the same. Keys below the top keep their letter case."""
    metadata, spec = Fields(), Fields()
    misspelt: set[Loc] = set()
    for part in (metadata, spec):
        part.standing_for(root)
    for key, value in root.entries.items():
        folded = key.lower()
        if folded in _SERVER_OWNED:
            if not _is_empty(value):
                findings.warn(f"{value.path} is set by the server and was ignored")
            continue
        into, name = (metadata, folded) if folded in _METADATA else (spec, _SPEC.get(folded, ""))
        if not name:
            hint = "" if findings.is_full else nearest(key, _top_names())
            findings.add(value, "is not a known field", hint=hint)
            misspelt.add(_loc_of(hint))
        elif name in into.entries:
            findings.add(value, f"is given twice: {pascal_name(name)} in another letter case")
        else:
            into.entries[name] = value
    if isinstance(tasks := spec.entries.get("tasks"), Items):
        spec.entries["tasks"] = _one_task(tasks, findings)
    return Flattened(_manifest(root, metadata, spec), frozenset(misspelt))


def _loc_of(hint: str) -> Loc:
    """The place of the field that a hint such as `did you mean Type?` suggests."""
    name = suggested_by(hint).lower()
    return ("metadata", name) if name in _METADATA else ("spec", _SPEC.get(name, ""))


def _manifest(root: Fields, metadata: Fields, spec: Fields) -> Fields:
    manifest = Fields()
    manifest.standing_for(root)
    manifest.entries = {
        "apiVersion": Scalar(API_VERSION, API_VERSION),
        "kind": Scalar("Job", "Job"),
        "metadata": metadata,
        "spec": spec,
    }
    return manifest


def _top_names() -> list[str]:
    return [pascal_name(name) for name in (*_METADATA, *_SPEC.values())]


def pascal_name(name: str) -> str:
    """The flat form's spelling of a field: `resultPaths` as `ResultPaths`, `cpu` as `CPU`."""
    return _SPELLINGS.get(name, name[:1].upper() + name[1:])


def _has_text(node: Node | None) -> bool:
    return isinstance(node, Scalar) and bool(node.text) and not is_null(node)


def _is_empty(node: Node) -> bool:
    """True for what clients send without meaning anything: 0, "", {} and an undefined state."""
    if isinstance(node, Fields):
        return all(_is_empty(value) for value in node.entries.values())
    if isinstance(node, Items):
        return not node.items
    return is_null(node) or (isinstance(node, Scalar) and node.text in ("", "0", "Undefined"))


def _one_task(tasks: Items, findings: Findings) -> Items:
    """The first task alone, as the flat form has always had it."""
    if len(tasks.items) > 1:
        findings.warn(f"{tasks.path} has {len(tasks.items)} tasks; only the first is used")
    first = Items()
    first.standing_for(tasks)
    first.items = tasks.items[:1]
    for task in first.items:
        if isinstance(task, Fields):
            _modernise_wasm(task)
    return first


# --- The older form of WebAssembly jobs -----------------------------------------------------------


def _modernise_wasm(task: Fields) -> None:
    """Modules given as whole input sources move to the task's inputs; the engine keeps their
    targets."""
    engine = task.find("Engine")
    params = engine.find("Params") if isinstance(engine, Fields) else None
    kind = engine.find("Type") if isinstance(engine, Fields) else None
    if not isinstance(params, Fields) or not isinstance(kind, Scalar):
        return
    if kind.text.strip().lower() != "wasm":
        return
    for key, value in list(params.entries.items()):
        if key.lower() == "entrymodule" and isinstance(value, Fields):
            params.entries[key] = _move_module(task, value, "/wasm/entry.wasm")
        if key.lower() == "importmodules" and isinstance(value, Items):
            for index, module in enumerate(value.items):
                if isinstance(module, Fields):
                    target = f"/wasm/imports/module_{index}.wasm"
                    value.items[index] = _move_module(task, module, target)


def _move_module(task: Fields, source: Fields, target: str) -> Scalar:
    given = source.find("Target")
    if isinstance(given, Scalar) and given.text.strip():
        target = given.text
    else:
        for key in [k for k in source.entries if k.lower() == "target"]:
            del source.entries[key]
        source.put("Target", Scalar(target, target, source.line))
    inputs = task.find("InputSources")
    if inputs is None or is_null(inputs):
        for key in [k for k in task.entries if k.lower() == "inputsources"]:
            del task.entries[key]
        inputs = Items(source.line)
        task.put("InputSources", inputs)
    if isinstance(inputs, Items):
        inputs.items.append(source)
    module = Scalar(target, target)
    module.standing_for(source)
    return module


# --- Writing --------------------------------------------------------------------------------------

_FREE_FORM: Final = ("Env", "Meta", "Labels", "Annotations")


def from_job(job: Job) -> dict[str, Any]:
    """The job in the flat form, as plain data: what its user gave, without what the server owns."""
    spec = job.spec.but(stop_generation=0, rerun_nonce="", retry_nonce="").wire()
    meta = job.metadata.wire()
    flat: dict[str, Any] = {pascal_name(name): meta[name] for name in _METADATA if name in meta} | {
        "Type": spec.pop("type")
    }
    flat |= {pascal_name(name): _flat(value, name) for name, value in spec.items()}
    return flat


def _flat(value: Any, name: str) -> Any:
    if pascal_name(name) in _FREE_FORM:
        return value
    if isinstance(value, list):
        return [_flat(item, "") for item in value]
    if not isinstance(value, dict):
        return value
    if name == "resources":
        value = to_quantities(value)
        return {pascal_name(k): str(v) for k, v in value.items()}
    if name in ("engine", "publisher", "source"):
        return _flat_config(value, Role(name))
    return {pascal_name(k): _flat(v, k) for k, v in value.items()}


def _flat_config(config: dict[str, Any], role: Role) -> dict[str, Any]:
    """Known parameters are spelled like fields; those of plug points stay as they are."""
    flat: dict[str, Any] = {"Type": config["type"]}
    if params := config.get("params"):
        is_known = config["type"] in KNOWN[role]
        flat["Params"] = _flat_params(params) if is_known else params
    return flat


def _flat_params(params: Any) -> Any:
    if isinstance(params, dict):
        return {pascal_name(k): _flat_params(v) for k, v in params.items()}
    return params
