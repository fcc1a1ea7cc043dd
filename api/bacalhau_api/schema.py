"""JSON Schemas, from the types: of each kind as the API serves it, and of job files for editors.

The output is deterministic. A schema says less than `canonical` does (not what goes with what), and
of the spellings that are understood it knows the documented ones only.
"""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bacalhau_api.flatjob import pascal_name
from bacalhau_api.jobfile import APPLIABLE, SERVER_METADATA, SERVER_SPEC
from bacalhau_api.params import KNOWN, Role
from bacalhau_api.v1 import KINDS

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_CONFIGS: Final = {
    ("Task", "engine"): Role.ENGINE,
    ("Task", "publisher"): Role.PUBLISHER,
    ("InputSource", "source"): Role.SOURCE,
}
_QUANTITY: Final[Schema] = {"type": ["string", "number"]}
_RESOURCES: Final[Schema] = {
    "title": "Resources",
    "description": "Limits of one execution.",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "cpu": _QUANTITY | {"description": "Millicores like 500m, or cores like 0.5."},
        "memory": _QUANTITY | {"description": "Bytes, like 512Mi or 1.5GB."},
        "disk": _QUANTITY | {"description": "Bytes, like 10Gi."},
        "gpu": {"type": ["string", "integer"], "description": "Devices."},
        "cpuMillis": {"type": "integer", "minimum": 0, "description": "Instead of cpu."},
        "memoryBytes": {"type": "integer", "minimum": 0, "description": "Instead of memory."},
        "diskBytes": {"type": "integer", "minimum": 0, "description": "Instead of disk."},
    },
}
_AFTER: Final[Schema] = {
    "type": ["string", "integer", "null"],
    "description": "Instead of afterSeconds: a duration like 90s, 5m or 1h30m.",
}
_SCALAR: Final = ["string", "number", "boolean"]


def kind_schema(kind: str) -> Schema:
    """The schema of one kind, as it is stored and served. Raises KeyError for an unknown kind."""
    schema = KINDS[kind].model_json_schema(by_alias=True)
    return _sorted_keys({"$schema": DIALECT, **schema})


def job_file_schema() -> Schema:
    """The schema of a document that can be applied: a manifest of a kind that users write, or a job
    in the flat form."""
    defs = _definitions()
    for (owner, name), role in _CONFIGS.items():
        defs[role.title()] = _config(role)
        defs[owner]["properties"][name] = {"$ref": _ref(role.title())}
    defs["Resources"] = _RESOURCES
    defs["DisconnectPolicy"]["properties"]["after"] = _AFTER
    defs["JobSpec"]["properties"]["constraints"] = {
        "anyOf": [defs["JobSpec"]["properties"]["constraints"], {"type": "string"}]
    }
    for name in SERVER_SPEC:
        del defs["JobSpec"]["properties"][name]
    defs["ObjectMeta"] = _object_meta(defs["ObjectMeta"])
    for kind in APPLIABLE:
        defs[kind] = _manifest(defs[kind])
    written = {name: _as_written(schema) for name, schema in defs.items()}
    written |= {f"Flat{name}": _flat(schema) for name, schema in written.items()}
    written["FlatJob"] = _flat_job(written)
    root: Schema = {
        "$schema": DIALECT,
        "title": "Bacalhau manifest",
        "type": "object",
        "if": {"anyOf": [{"required": ["kind"]}, {"required": ["apiVersion"]}]},
        "then": {"oneOf": [{"$ref": _ref(kind)} for kind in APPLIABLE]},
        "else": {"$ref": _ref("FlatJob")},
    }
    return _sorted_keys(root | {"$defs": _reachable(root, written)})


def _ref(name: str) -> str:
    return f"#/$defs/{name}"


def _definitions() -> dict[str, Schema]:
    """The schemas of all models that manifests can contain, by name."""
    models: list[type[BaseModel]] = [*APPLIABLE.values()]
    models += [model for types in KNOWN.values() for model in types.values()]
    _, schema = models_json_schema([(m, "validation") for m in models], by_alias=True)
    defs: dict[str, Schema] = schema["$defs"]
    return defs


def _config(role: Role) -> Schema:
    """An engine, source or publisher: for each known type, its parameters."""
    cases = []
    for name, model in KNOWN[role].items():
        then: Schema = {"properties": {"params": {"$ref": _ref(model.__name__)}}}
        if any(info.is_required() for info in model.model_fields.values()):
            then["required"] = ["params"]
        condition = {"required": ["type"], "properties": {"type": {"const": name}}}
        cases.append({"if": condition, "then": then})
    return {
        "title": role.title(),
        "type": "object",
        "required": ["type"],
        "additionalProperties": False,
        "properties": {
            "type": {"anyOf": [{"enum": list(KNOWN[role])}, {"type": "string"}]},
            "params": {"type": "object"},
        },
        "allOf": cases,
    }


def _object_meta(schema: Schema) -> Schema:
    """What users may say, and must."""
    properties = {k: v for k, v in schema["properties"].items() if k not in SERVER_METADATA}
    return schema | {"properties": properties, "required": ["name"]}


def _manifest(schema: Schema) -> Schema:
    properties = {k: v for k, v in schema["properties"].items() if k != "status"}
    required = {"apiVersion", "kind", "metadata", *schema.get("required", ())}
    return schema | {"properties": properties, "required": sorted(required)}


def _as_written(schema: Any) -> Any:
    """What a file may hold for it: scalars where text is wanted, durations where seconds are, and
    nothing where there is a default."""
    if isinstance(schema, list):
        return [_as_written(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _as_written(value) for key, value in schema.items()}
    if out.get("type") == "string" and "enum" not in out and "const" not in out:
        out["type"] = _SCALAR
    if isinstance(out.get("properties"), dict) and "type" in out:
        required = out.get("required", ())
        out["properties"] = {
            name: _property(name, value, name in required)
            for name, value in out["properties"].items()
        }
    return out


def _property(name: str, schema: Schema, is_required: bool) -> Schema:
    options = [schema]
    is_number = schema.get("type") in ("integer", "number")
    if name.endswith(("Seconds", "SecondsMax", "Timeout")) and (is_number or "anyOf" in schema):
        options.append({"type": "string", "description": "A duration such as 90s or 1h30m."})
    if not is_required:
        options.append({"type": "null"})
    return {"anyOf": options} if len(options) > 1 else schema


# --- The flat form --------------------------------------------------------------------------------


def _flat(schema: Any) -> Any:
    """The same with keys spelled as in the flat form; other letter cases are allowed."""
    if isinstance(schema, list):
        return [_flat(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _flat(value) for key, value in schema.items() if key != "required"}
    if isinstance(schema.get("$ref"), str):
        out["$ref"] = schema["$ref"].replace("#/$defs/", "#/$defs/Flat")
    if isinstance(schema.get("properties"), dict):
        properties = {pascal_name(k): _flat(v) for k, v in schema["properties"].items()}
        out["properties"] = properties
        out["patternProperties"] = {_any_case(k): v for k, v in properties.items()}
    if required := schema.get("required"):
        out["allOf"] = [*out.get("allOf", ()), *(_required(name) for name in required)]
    return out


def _any_case(name: str) -> str:
    letters = (f"[{c.upper()}{c.lower()}]" if c.isalpha() else c for c in name)
    return f"^{''.join(letters)}$"


def _required(name: str) -> Schema:
    spellings = dict.fromkeys((pascal_name(name), name, name.lower()))
    return {"anyOf": [{"required": [spelling]} for spelling in spellings]}


def _flat_job(defs: Mapping[str, Schema]) -> Schema:
    """Metadata and spec side by side, with what clients send along and the server ignores."""
    meta, spec = defs["FlatObjectMeta"], defs["FlatJobSpec"]
    ignored: Schema = {"description": "Set by the server; ignored."}
    owned = dict.fromkeys(
        ("ID", "State", "Version", "Revision", "CreateTime", "ModifyTime"), ignored
    )
    properties = owned | meta["properties"] | spec["properties"]
    return {
        "title": "Job in the flat form",
        "description": spec.get("description", ""),
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "patternProperties": {_any_case(name): value for name, value in properties.items()},
        "allOf": [*meta.get("allOf", ()), *spec.get("allOf", ())],
    }


def _reachable(root: Schema, defs: Mapping[str, Schema]) -> dict[str, Schema]:
    """The definitions that the root needs, directly or not."""
    found: dict[str, Schema] = {}
    todo: list[Any] = [root]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            name = str(item.get("$ref", "")).removeprefix("#/$defs/")
            if name and name not in found:
                found[name] = defs[name]
                todo.append(defs[name])
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return found


def _sorted_keys(schema: Schema) -> Schema:
    """With all keys in order, so that the same types always give the same text."""
    return {key: _sorted(schema[key]) for key in sorted(schema)}


def _sorted(schema: Any) -> Any:
    if isinstance(schema, dict):
        return _sorted_keys(schema)
    return [_sorted(x) for x in schema] if isinstance(schema, list) else schema
