"""What the configuration may hold, read off the section models: which keys exist where, and what each value may be.

In: a location (a tuple of keys and list positions, as in `("data", "train", 0, "path")`). Out: the section, the type
or the words for it. Everything comes from the pydantic models, so a new section needs no change in this file.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from functools import reduce
from itertools import pairwise
from operator import itemgetter
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


def section_within(annotation: Any) -> Optional[type[Section]]:
    """The section that this type is, or that its entries are."""
    return section_of(annotation) or section_of(item_type(annotation))


def item_type(annotation: Any) -> Any:
    """The type of a list's or mapping's values, or None where there are none."""
    for part in members(annotation):
        origin, arguments = typing.get_origin(part), typing.get_args(part)
        if origin in (list, tuple) and arguments:
            return arguments[0]
        if origin is dict:
            return arguments[1]
    return None


def holds_names(annotation: Any) -> bool:
    """Whether the entries of this type have names of the user's choice."""
    return any(typing.get_origin(part) is dict for part in members(annotation))


def field_at(location: Location) -> Optional[FieldInfo]:
    """The field that the last key of `location` names, or None if there is no such key."""
    if not location or not isinstance(location[-1], str):
        return None
    section = section_of(type_at(location[:-1]))
    return section.model_fields.get(location[-1]) if section else None


def type_at(location: Location) -> Any:
    """The type of the value at `location`, or None outside the known keys."""
    return reduce(_type_under, location, RunConfig)


def _type_under(annotation: Any, part: Union[str, int]) -> Any:
    section = section_of(annotation)
    if section is None:
        return item_type(annotation)
    field = section.model_fields.get(str(part))
    return field.annotation if field is not None else None


def meaning_of(location: Location) -> str:
    """The first line of the docstring of the key at `location`; empty if it has none."""
    section = section_of(type_at(location[:-1]))
    return field_docstrings(section).get(str(location[-1]), "").split("\n")[0] if section is not None else ""


def field_docstrings(section: type[Section]) -> dict[str, str]:
    """The text under each field, inherited ones included, read from the source code.

    pydantic can do this for every class as it is defined (`use_attribute_docstrings`), which doubles the time until a wrong
    configuration is reported; only the schema, the reference page and the message about a missing key need them.
    """
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section) and base is not Section:
            [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for pair in pairwise(definition.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text)
    return found


def all_keys() -> Iterator[Location]:
    """Every key of the configuration; list positions as 0 and free names as `<name>`."""
    yield from _keys_of(RunConfig, ())


def _keys_of(section: type[Section], prefix: Location) -> Iterator[Location]:
    for name, field in section.model_fields.items():
        location = (*prefix, name)
        yield location
        inner, step = section_of(field.annotation), location
        if inner is None and (item := item_type(field.annotation)) is not None:
            inner, step = section_of(item), (*location, "<name>" if holds_names(field.annotation) else 0)
        if inner is not None:
            yield from _keys_of(inner, step)


def strip_tags(location: Location) -> Location:
    """A pydantic location without what pydantic adds for unions: `section`/`target` and the names of alternatives."""
    clean: list[Union[str, int]] = []
    annotation: Any = RunConfig
    for part in location:
        alternatives = members(annotation)
        if len(alternatives) > 1 and is_component(annotation):
            annotation = Target if part == "target" else section_of(annotation)
        elif len(alternatives) > 1:
            annotation = next((m for m in alternatives if typing.get_origin(m) is not None), None)
        elif part != "[key]":
            clean.append(part)
            annotation = _type_under(annotation, part)
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
    parts = []
    for words, tightest in (({"ge": "of at least", "gt": "above"}, max), ({"le": "of at most", "lt": "below"}, min)):
        limits = [
            (value, word)
            for item in constraints(field)
            for name, word in words.items()
            if (value := getattr(item, name, None)) is not None
        ]
        if limits:
            value, word = tightest(reversed(limits), key=itemgetter(0))  # of equal limits the last
            parts.append(f"{word} {'2^63' if value == 2**63 else f'{value:g}'}")
    return " " + " and ".join(parts) if parts else ""


def number_kind(field: Optional[FieldInfo]) -> Optional[str]:
    """The words for a field that reads numbers as people write them (a count, a duration, a size), else None."""
    for item in constraints(field):
        if isinstance(item, BeforeValidator) and item.func in NUMBERS_AS_WRITTEN:
            return NUMBERS_AS_WRITTEN[item.func]  # type: ignore[index]
    return None


def choices(annotation: Any) -> list[str]:
    """The values of a `Literal` type, else an empty list."""
    literals = [part for part in members(annotation) if typing.get_origin(part) is Literal]
    return [str(value) for part in literals for value in typing.get_args(part)]


def in_words(annotation: Any, plural: bool = False) -> str:
    """A type in plain words: `a whole number`, `text or a list of texts`."""
    words = [_one_in_words(part, plural) for part in members(annotation)]
    return " or ".join(dict.fromkeys(words))


def types_in_words(annotation: Any) -> str:
    """What a type takes beside its `choices`, in plain words; empty where that is nothing."""
    parts = [part for part in members(annotation) if typing.get_origin(part) is not Literal]
    return " or ".join(dict.fromkeys(_one_in_words(part, plural=False) for part in parts))


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
