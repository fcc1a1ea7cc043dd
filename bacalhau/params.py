"""Parameters of a plug (engine, storage, publisher) as typed values.

Job files write parameter names in any letter case (`EntryModule`, `entryModule`); a model names
them once. What is wrong is said with the parameter, the value and the remedy.
"""

import difflib
import json
from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from bacalhau_api.base import Model
from bacalhau_api.errors import Problem, TerminalError

M = TypeVar("M", bound=Model)


def read_params(model: type[M], params: Mapping[str, object], *, what: str, reason: str) -> M:
    """Check parameters against a model. `what` names the plug, such as `engine wasm`.

    Raises TerminalError with the given reason; its message lists every problem.
    """
    names = {
        (field.alias or name).replace("_", "").lower(): field.alias or name
        for name, field in model.model_fields.items()
    }
    given: dict[str, object] = {}
    problems: list[Problem] = []
    for key, value in params.items():
        name = names.get(key.replace("_", "").lower())
        if name is None:
            near = difflib.get_close_matches(key.lower(), names, n=1)
            known = f"did you mean {names[near[0]]}?" if near else _known(names.values())
            problems.append(Problem(f"params.{key}", "is not known", hint=known))
        elif value is not None:
            given[name] = value
    if not problems:
        try:
            return model.model_validate_json(json.dumps(given))
        except ValidationError as error:
            for item in error.errors(include_url=False):
                field = ".".join(["params", *(str(part) for part in item["loc"])])
                value = "" if item["type"] == "missing" else _short(item["input"])
                problems.append(Problem(field, item["msg"].lower(), value))
    raise TerminalError(f"{what}: " + "; ".join(map(str, problems)), reason=reason)


def _known(names: object) -> str:
    listed = ", ".join(sorted(map(str, names))) if hasattr(names, "__iter__") else ""
    return f"known: {listed}" if listed else "there are none"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
