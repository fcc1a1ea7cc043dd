"""Fills the gaps of an object that failed validation, so that the rules can look at the rest of it
and all problems are reported at once. What comes out is looked at and thrown away.
"""

import json
import types
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ValidationError

Loc = tuple[str | int, ...]

ROUNDS_MAX: Final = 6
_M = TypeVar("_M", bound=BaseModel)


def mend(data: Any, model: type[_M]) -> tuple[_M | None, frozenset[Loc]]:
    """The model built from `data` (which is changed) with placeholders where values are wrong, and
    where these are. None if it cannot be mended."""
    mended: set[Loc] = set()
    for _ in range(ROUNDS_MAX):
        try:
            return model.model_validate_json(json.dumps(data)), frozenset(mended)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=False)
            locs = {detail["loc"] for detail in details}
            # A list of nothing but wrong entries is also said to be too short.
            above = {loc[:end] for loc in locs for end in range(len(loc))}
            for loc in locs - above:
                if not _patch(data, model, loc):
                    return None, frozenset()
                mended.add(loc)
    return None, frozenset()


def _patch(data: Any, model: type[BaseModel], loc: Loc) -> bool:
    """Replace the value at `loc` by a placeholder, or remove it where there is a default."""
    annotation, has_default = _field_at(model, loc)
    holder = _walk(data, loc[:-1])
    if annotation is None or not loc:
        return False
    last = loc[-1]
    if isinstance(holder, dict) and isinstance(last, str):
        if has_default:
            holder.pop(last, None)
        else:
            holder[last] = _placeholder(annotation)
        return True
    if isinstance(holder, list) and isinstance(last, int) and last < len(holder):
        holder[last] = _placeholder(annotation)
        return True
    return False


def _walk(data: Any, loc: Iterable[str | int]) -> Any:
    for step in loc:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _field_at(model: type[BaseModel], loc: Loc) -> tuple[Any, bool]:
    """The type of what stands at `loc`, and whether it may be left out; (None, False) if no type
    stands there."""
    annotation: Any = model
    has_default = False
    for step in loc:
        annotation = _bare(annotation)
        args = typing.get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            by_wire = {info.alias or name: info for name, info in annotation.model_fields.items()}
            info = by_wire.get(str(step))
            if info is None:
                return None, False
            annotation, has_default = info.annotation, not info.is_required()
        elif typing.get_origin(annotation) is tuple and isinstance(step, int):
            annotation, has_default = args[0], False
        elif typing.get_origin(annotation) is dict and isinstance(step, str):
            annotation, has_default = args[1], True
        else:
            return None, False
    return _bare(annotation), has_default


def _bare(annotation: Any) -> Any:
    """Without `Annotated` and `| None`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _bare(args[0])
    if origin in (typing.Union, types.UnionType):
        return _bare(next(a for a in args if a is not type(None)))
    return annotation


def _placeholder(annotation: Any) -> Any:
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return []
    if origin is Literal:
        return typing.get_args(annotation)[0]
    if isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            return {}
        if issubclass(annotation, Enum):
            return next(iter(annotation)).value
        if issubclass(annotation, str):
            return ""
        if issubclass(annotation, int | float):
            return 0
    return {} if origin is dict else None
