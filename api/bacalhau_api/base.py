"""The base of every type: frozen, strict, camelCase on the wire, unknown fields refused.

Types do no I/O. Decode with `decode` (JSON text, the strict way), encode with `encode`.
"""

from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

_set = object.__setattr__  # the models are frozen


def _aware(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise ValueError("a time needs its zone, such as 2026-01-31T12:00:00Z")
    return value.astimezone(UTC)


Timestamp = Annotated[datetime, AfterValidator(_aware)]
"""A moment in UTC; RFC 3339 with a zone on the wire."""


class Model(BaseModel):
    """Frozen and strict. Python names are snake_case, wire names camelCase."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=to_camel,
        populate_by_name=True,
        validate_default=False,
        allow_inf_nan=False,
        use_enum_values=False,
    )

    @classmethod
    def decode(cls, text: str | bytes) -> Self:
        """Parse JSON. Raises pydantic.ValidationError."""
        return cls.model_validate_json(text)

    def encode(self) -> bytes:
        """Compact JSON, wire names; fields that hold their default are left out."""
        return self.model_dump_json(by_alias=True, exclude_defaults=True).encode()

    def wire(self) -> dict[str, Any]:
        """The same as `encode`, as plain Python data (JSON types only), for output and schemas."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    def but(self, **changes: Any) -> Self:
        """A copy with some fields (by Python name) replaced. Values are not validated again."""
        # What `model_copy` does for a model without private or extra fields, in a third of the
        # time: reconcilers copy more than they do anything else.
        new = self.__new__(type(self))
        _set(new, "__dict__", {**self.__dict__, **changes})
        _set(new, "__pydantic_extra__", None)
        _set(new, "__pydantic_fields_set__", {*self.__pydantic_fields_set__, *changes})
        _set(new, "__pydantic_private__", None)
        return new
