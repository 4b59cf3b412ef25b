"""The configuration for editors (JSON Schema) and for people (a reference page), both from the section models.

The schema describes what a person may write: a count is a number or a text such as "2B", a component may be a mapping with
`_target_`, and `null` is an empty section. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import PydanticUndefined, core_schema

from steep.config.keys import (
    NUMBERS_AS_WRITTEN,
    allows_null,
    bounds,
    choices,
    field_docstrings,
    holds_names,
    is_component,
    item_type,
    number_kind,
    section_of,
    section_within,
    types_in_words,
)
from steep.config.run import RunConfig
from steep.core.section import Section
from steep.core.units import BYTE_UNITS, COUNT_UNITS, SECOND_UNITS, parse_bytes, parse_count, parse_seconds

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_UNITS: dict[Any, dict[str, Any]] = {parse_count: COUNT_UNITS, parse_seconds: SECOND_UNITS, parse_bytes: BYTE_UNITS}
_NUMBER_PATTERN = r"[0-9][0-9_,]*(\.[0-9]+)?([eE][+-]?[0-9]+)?|\.[0-9]+"


class _Schema(GenerateJsonSchema):
    """pydantic's generator, except that numbers as people write them may be text."""

    schema_dialect = SCHEMA_DIALECT

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> JsonSchemaValue:
        number = super().function_before_schema(schema)
        function: Any = schema["function"]["function"]
        if function not in _UNITS:
            return number
        units = "|".join(sorted({unit for unit in _UNITS[function] if unit}, key=lambda unit: (-len(unit), unit)))
        either_case = "".join(f"[{letter.upper()}{letter}]" if letter.isalpha() else letter for letter in units)
        pattern = rf"^\s*({_NUMBER_PATTERN})\s*({either_case})?\s*$"
        return {"anyOf": [number, {"type": "string", "pattern": pattern, "description": NUMBERS_AS_WRITTEN[function]}]}


def document_sections(root: type[Section]) -> None:
    """Give every field below `root` its docstring as its description. Calling it again changes nothing."""
    for section in dict.fromkeys(sections_below(root)):
        texts = field_docstrings(section)
        for name, field in section.model_fields.items():
            field.description = field.description or texts.get(name)
        section.model_rebuild(force=True)


def sections_below(root: type[Section]) -> Iterator[type[Section]]:
    """`root` and the sections of its fields; a section comes after those it holds."""
    for field in root.model_fields.values():
        inner = section_within(field.annotation)
        if inner is not None:
            yield from sections_below(inner)
    yield root


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a run's configuration, with every field's documentation and default."""
    document_sections(RunConfig)
    schema = RunConfig.model_json_schema(by_alias=True, schema_generator=_Schema)
    schema = {"$schema": SCHEMA_DIALECT, **_with_limits(schema), "title": "steep run"}
    for name, field in RunConfig.model_fields.items():
        if section_of(field.annotation) is not None:
            schema["properties"][name] = _describe_section(schema["properties"][name], field)
    return schema


_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _with_limits(schema: Any) -> Any:
    """`schema` with the limits that pydantic writes beside `anyOf`, under its own names, moved to the numbers in it."""
    if isinstance(schema, list):
        return [_with_limits(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    limits = {_LIMITS[key]: value for key, value in schema.items() if key in _LIMITS and "anyOf" in schema}
    kept = {key: _with_limits(value) for key, value in schema.items() if not limits or key not in _LIMITS}
    if limits:
        numbers = ("integer", "number")
        kept["anyOf"] = [{**item, **limits} if item.get("type") in numbers else item for item in kept["anyOf"]]
    return kept


def _describe_section(found: dict[str, Any], field: FieldInfo) -> dict[str, Any]:
    """Add the section's docstring where the field has none, and null for a section left empty."""
    section = section_of(field.annotation)
    found = {"description": _paragraph(section.__doc__), **found} if section else found
    if field.is_required() or allows_null(field.annotation):
        return found
    kept = {key: value for key, value in found.items() if key in ("description", "default", "title")}
    choice = {key: value for key, value in found.items() if key not in kept}
    return {**kept, "anyOf": [*(choice.get("oneOf") or choice.get("anyOf") or [choice]), {"type": "null"}]}


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


# --- the reference page -----------------------------------------------------------------------------------------------

_HEAD = """\
# Configuration

<!-- Written by `python -m steep.config.schema`, from the section models. Do not edit. -->

A run is described by a YAML file with the sections below; only `model` and `data` are needed. Any key can be given on
the command line as `--section.key value`, which overrides the file, which overrides the default. A number in a key
is a position in a list: `--data.train.0.path corpus/`. An unknown key is an error that names the nearest one.

Numbers may be written as `1e-4` or `1_000`; counts as `500M` or `2B`, durations as `90s`, `30min` or `2h`, sizes as
`500MB` or `8GiB`. Only `true` and `false` are booleans, `null` means no value. Relative paths are relative to the current
directory. Where a section is marked *or `_target_`*, any callable can replace it:

```yaml
model:
  _target_: ./my_model.py:build      # or my_pkg.models.build, or transformers.AutoModelForCausalLM.from_config
  vocab_size: 32000                  # the other keys are its arguments; nested _target_ mappings are built first
```
"""
_TABLE = "| Key | Type | Default | Meaning |\n|---|---|---|---|"


def reference_markdown() -> str:
    """The page docs/reference/configuration.md: one table of keys per section."""
    document_sections(RunConfig)
    parts = [_HEAD]
    for name, field in RunConfig.model_fields.items():
        if section_within(field.annotation) is not None:
            parts += _section_page(name, field, level=2)
        else:
            parts += [f"## `{name}`\n", _TABLE, _row(name, field), ""]
    return "\n".join(parts).rstrip() + "\n"


def _section_page(name: str, field: FieldInfo, level: int) -> Iterator[str]:
    annotation, title = field.annotation, name
    if section_of(annotation) is None:
        title = f"{name}.<name>" if holds_names(annotation) else f"{name}.<number>"
        annotation = item_type(annotation)
    section = section_of(annotation)
    assert section is not None, f"{name} holds no section"
    remark = " *or `_target_`*" if is_component(annotation) else ""
    yield f"{'#' * level} `{title}`{remark}\n"
    yield f"{_escaped(_paragraph(section.__doc__))}\n"
    yield _TABLE
    yield from (_row(key, inner) for key, inner in section.model_fields.items())
    if section.model_config.get("extra") == "allow":
        yield "| any other key | | | passed on as an argument |"
    yield ""
    for key, inner in section.model_fields.items():
        if section_within(inner.annotation) is not None:
            yield from _section_page(f"{name}.{key}", inner, level + 1)


def _row(key: str, field: FieldInfo) -> str:
    cells = [f"`{key}`", type_cell(field), _default_cell(field), _escaped(_paragraph(field.description))]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Angle brackets outside of code spans, which Markdown would take for HTML."""
    spans = text.split("`")
    return "`".join(span.replace("<", "&lt;") if position % 2 == 0 else span for position, span in enumerate(spans))


def type_cell(field: FieldInfo) -> str:
    """A field's type for the table, in words, with its limits."""
    if section_of(field.annotation) is not None:
        return "section"
    kind, limits, words = number_kind(field), bounds(field), types_in_words(field.annotation)
    if kind is not None:
        words, limits = kind.split(" such as ")[0], "" if limits == " of at least 0" else limits
    names = ", ".join(f"`{name}`" for name in choices(field.annotation))
    return ", ".join(filter(None, (names, words.removeprefix("a ") + limits.replace(" of", ""))))


def _default_cell(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    default = field.default_factory() if field.default_factory is not None else field.default  # type: ignore[call-arg]
    if isinstance(default, Section):
        return "see below"
    if default is None or default is PydanticUndefined:
        return "–"
    kind = number_kind(field)
    if isinstance(default, str):
        return f"`{default}`"
    if isinstance(default, int) and not isinstance(default, bool) and kind == NUMBERS_AS_WRITTEN[parse_bytes]:
        return f"`{default // 2**20}MiB`" if default % 2**20 == 0 else f"`{default}`"
    return f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"


if __name__ == "__main__":
    print(reference_markdown(), end="")
