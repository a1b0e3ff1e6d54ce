"""What all sections are made of: typed fields, and errors in one sentence."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, its value and the way out."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Fields with types, defaults and descriptions; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


SectionType = TypeVar("SectionType", bound=Section)


def require_multiple(field: str, value: int, of_field: str, of: int) -> None:
    """ValueError where one field is no multiple of another."""
    if value % of:
        raise ValueError(
            f"{field}={value} is not divisible by {of_field}={of}: choose {field} as a multiple of {of}, "
            f"or {of_field} as a divisor of {value}"
        )


def parse_section(kind: type[SectionType], values: dict[str, Any]) -> SectionType:
    """Validate a nested dict as a section of this kind; raises ConfigError in one sentence."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_sentence(error, kind)) from None


def _one_sentence(error: ValidationError, kind: type[Section]) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_fields(kind, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        way_out = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {field}={first['input']!r}: {way_out}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}={first['input']!r} is refused: {message[0].lower()}{message[1:]}"


def _known_fields(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    fields = kind.model_fields
    for part in location:
        section = fields[str(part)].annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        fields = section.model_fields
    return list(fields)
