"""The docstrings under the fields of the sections, read from their source code.

pydantic can do this for every class as it is defined (`use_attribute_docstrings`), which doubles the time until a
wrong configuration is reported; only the schema and the reference page need them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from steep.config.keys import item_type, section_of
from steep.core.section import Section


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
        inner: Any = section_of(field.annotation) or section_of(item_type(field.annotation))
        if inner is not None:
            yield from sections_below(inner)
    yield root


def meaning_of(root: type[Section], location: Sequence[str | int]) -> str:
    """The first line of the docstring of the field at `location` (keys and list positions) below `root`; empty if it has none."""
    section: Any = root
    *path, name = [part for part in location if isinstance(part, str)] or [""]
    for part in path:
        field = section.model_fields.get(part) if section is not None else None
        section = (section_of(field.annotation) or section_of(item_type(field.annotation))) if field else section
    text = field_docstrings(section).get(name, "") if section is not None else ""
    return text.split("\n")[0]


def field_docstrings(section: type[Section]) -> dict[str, str]:
    """The text under each field, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section) and base is not Section:
            found.update(_docstrings_of_source(textwrap.dedent(inspect.getsource(base))))
    return found


def _docstrings_of_source(source: str) -> dict[str, str]:
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
