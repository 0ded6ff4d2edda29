"""The base of every section of a recipe. Each room keeps its own section in its `config.py`."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, field_validator


class Section(BaseModel):
    """Unknown keys are refused, and so are `true` for a number, infinity and nan; values never change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: Any) -> Any:
        """YAML's `off` for a key that is off by default is its default; `true` would pass for 1."""
        if not isinstance(value, bool):
            return value
        field = cls.model_fields[info.field_name]
        if value is False and field.default is None:
            return None
        kinds = _kinds(field.annotation)
        counts = any(kind in (int, float) or (isinstance(kind, int) and not isinstance(kind, bool)) for kind in kinds)
        if value and counts and bool not in kinds:
            raise ValueError("give a number" + (", or false to turn it off" if kinds & {None, False} else ""))
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types and literals that a key may be of; None for null."""
    if get_origin(annotation) in (dict, list):
        return {get_origin(annotation)}
    if annotation is type(None):
        return {None}
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def same(a: Any, b: Any) -> bool:
    """Whether two values of a key are one: 0 is not `false`, though Python takes them for equal."""
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def changed(section: Section) -> dict[str, Any]:
    """The keys whose values are not their defaults, and those without one, as JSON has them; sections within alike."""
    content = section.model_dump(mode="json")
    found = {}
    for name, field in type(section).model_fields.items():
        value, default = getattr(section, name), field.get_default(call_default_factory=True)
        if isinstance(value, Section):
            inner = changed(value)
            if inner or not isinstance(default, Section):
                found[name] = inner
        elif not same(value, default):
            found[name] = content[name]
    return found
