"""Every field of a run config as help text, from the descriptions that stand in `foejax.config`."""

from __future__ import annotations

import textwrap
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from foejax.config import RunConfig

_WIDTH = 110


def describe_fields() -> str:
    """One entry a field: `section.field`, type and default, description."""
    lines = []
    for section, info in RunConfig.model_fields.items():
        kind = info.annotation
        assert isinstance(kind, type) and issubclass(kind, BaseModel)
        summary = (kind.__doc__ or "").split(".")[0]
        lines.append(f"{section}: {summary}")
        for name, field in kind.model_fields.items():
            lines.append(f"  --{section}.{name} {_type_text(field)} = {_default_text(field.default)}")
            lines += textwrap.wrap(
                " ".join((field.description or "").split()), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _type_text(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(field.annotation))
    name = getattr(field.annotation, "__name__", str(field.annotation))
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(limit, attribute):g}"
        for limit in field.metadata
        for attribute, sign in signs.items()
        if getattr(limit, attribute, None) is not None
    ]
    return name + (f" ({', '.join(bounds)})" if bounds else "")


def _default_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
