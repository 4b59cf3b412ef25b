"""What the configuration may hold, read off the section models: which keys exist where, and what each value may be.

In: a location (a tuple of keys and list positions, as in `("data", "train", 0, "path")`). Out: the section, the type
or the words for it. Everything comes from the pydantic models, so a new section needs no change in this file.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from steep.config.run import RunConfig
from steep.core.section import Section, Target
from steep.core.units import parse_bytes, parse_count, parse_seconds

Location = tuple[Union[str, int], ...]

NUMBERS_AS_WRITTEN = {
    parse_count: "a count such as 2000, 500M or 2B",
    parse_seconds: "a duration such as 90s, 30min or 2h",
    parse_bytes: "a size such as 500MB or 8GiB",
}


def dotted(location: Location) -> str:
    """A location as it is written on the command line: `data.train.0.path`."""
    return ".".join(str(part) for part in location)


def members(annotation: Any) -> list[Any]:
    """The alternatives of a union, without None and `Annotated`; a list of one for any other type."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [inner for part in typing.get_args(annotation) if part is not type(None) for inner in members(part)]
    return [annotation]


def allows_null(annotation: Any) -> bool:
    """Whether `null` is a value of this type."""
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    is_union = typing.get_origin(annotation) in (Union, types.UnionType)
    return annotation is Any or (is_union and type(None) in typing.get_args(annotation))


def is_component(annotation: Any) -> bool:
    """Whether a mapping with `_target_` may replace the section."""
    return Target in members(annotation)


def section_of(annotation: Any) -> Optional[type[Section]]:
    """The section that this type is, if it is one (a component's section too)."""
    found = [part for part in members(annotation) if isinstance(part, type) and issubclass(part, Section)]
    return found[0] if found else None


def item_type(annotation: Any) -> Any:
    """The type of a list's or mapping's values, or None where there are none."""
    for part in members(annotation):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if origin in (list, tuple) and arguments:
            return arguments[0]
        if origin is dict:
            return arguments[1]
    return None


def field_at(location: Location) -> Optional[FieldInfo]:
    """The field that the last key of `location` names, or None if there is no such key."""
    if not location or not isinstance(location[-1], str):
        return None
    section = section_of(type_at(location[:-1]))
    return section.model_fields.get(location[-1]) if section else None


def type_at(location: Location) -> Any:
    """The type of the value at `location`, or None outside the known keys."""
    annotation: Any = RunConfig
    for part in location:
        section = section_of(annotation)
        if section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        else:
            annotation = item_type(annotation)
        if annotation is None:
            return None
    return annotation


def all_keys() -> Iterator[Location]:
    """Every key of the configuration; list positions as 0 and free names as `<name>`."""
    yield from _keys_of(RunConfig, ())


def _keys_of(section: type[Section], prefix: Location) -> Iterator[Location]:
    for name, field in section.model_fields.items():
        location = (*prefix, name)
        yield location
        inner, step = section_of(field.annotation), location
        if inner is None and (item := item_type(field.annotation)) is not None:
            is_mapping = any(typing.get_origin(part) is dict for part in members(field.annotation))
            inner, step = section_of(item), (*location, "<name>" if is_mapping else 0)
        if inner is not None:
            yield from _keys_of(inner, step)


def strip_tags(location: Location) -> Location:
    """A pydantic location without what pydantic adds for unions: `section`/`target` and the names of alternatives."""
    clean: list[Union[str, int]] = []
    annotation: Any = RunConfig
    rest = list(location)
    while rest:
        if annotation is not None and len(members(annotation)) > 1:
            tag = rest.pop(0)
            if is_component(annotation):
                annotation = Target if tag == "target" else section_of(annotation)
            else:
                annotation = next((m for m in members(annotation) if typing.get_origin(m) is not None), None)
            continue
        part = rest.pop(0)
        if part == "[key]":
            continue
        clean.append(part)
        section = section_of(annotation) if annotation is not None else None
        if section is not None:
            field = section.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
        else:
            annotation = item_type(annotation) if annotation is not None else None
    return tuple(clean)


def constraints(field: Optional[FieldInfo]) -> list[Any]:
    """Everything that limits a field's value: its own metadata and that of its type (`Count`, for example)."""
    if field is None:
        return []
    found = list(field.metadata)
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        if typing.get_origin(annotation) is Annotated:
            inner, *extra = typing.get_args(annotation)
            pending.append(inner)
            for item in extra:
                found += item.metadata if isinstance(item, FieldInfo) else [item]
        elif typing.get_origin(annotation) in (Union, types.UnionType):
            pending += typing.get_args(annotation)
    return found


def bounds(field: Optional[FieldInfo]) -> str:
    """The limits of a field, in words: ` above 0 and below 1`; empty if there are none."""
    lower, upper = None, None
    for item in constraints(field):
        low = [(getattr(item, "ge", None), "of at least"), (getattr(item, "gt", None), "above")]
        high = [(getattr(item, "le", None), "of at most"), (getattr(item, "lt", None), "below")]
        for value, word in low:
            if value is not None and (lower is None or value >= lower[0]):
                lower = (value, word)
        for value, word in high:
            if value is not None and (upper is None or value <= upper[0]):
                upper = (value, word)
    parts = [f"{word} {_shown_bound(value)}" for value, word in (b for b in (lower, upper) if b is not None)]
    return (" " + " and ".join(parts)) if parts else ""


def _shown_bound(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"


def number_kind(field: Optional[FieldInfo]) -> Optional[str]:
    """The words for a field that reads numbers as people write them (a count, a duration, a size), else None."""
    for item in constraints(field):
        if isinstance(item, BeforeValidator) and item.func in NUMBERS_AS_WRITTEN:
            return NUMBERS_AS_WRITTEN[item.func]  # type: ignore[index]
    return None


def choices(annotation: Any) -> list[str]:
    """The values of a `Literal` type, else an empty list."""
    return [
        str(value) for part in members(annotation) if typing.get_origin(part) is Literal
        for value in typing.get_args(part)
    ]  # fmt: skip


def in_words(annotation: Any, plural: bool = False) -> str:
    """A type in plain words: `a whole number`, `text or a list of texts`."""
    words = [_one_in_words(part, plural) for part in members(annotation)]
    return " or ".join(dict.fromkeys(words))


def _one_in_words(annotation: Any, plural: bool) -> str:
    if names := choices(annotation):
        return "one of " + ", ".join(names)
    simple = {bool: ("true or false", "true or false"), int: ("a whole number", "whole numbers"),
              float: ("a number", "numbers"), str: ("text", "texts"), Any: ("a value", "values")}  # fmt: skip
    if annotation in simple:
        return simple[annotation][plural]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is list:
        return f"{'lists' if plural else 'a list'} of {in_words(arguments[0], plural=True)}"
    if origin is tuple:
        return f"a list of {len(arguments)} {in_words(arguments[0], plural=True)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mappings" if plural else "a mapping of keys to values"
    return "mappings" if plural else "a mapping"
