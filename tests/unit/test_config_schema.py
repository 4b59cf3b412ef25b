"""The JSON Schema accepts what the loader accepts, and the reference page names every key."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from steep.config.keys import all_keys
from steep.config.load import load_run_config
from steep.config.schema import json_schema, reference_markdown
from steep.core.errors import ConfigError
from steep.core.units import parse_bytes, parse_count, parse_seconds

MINIMAL: dict[str, Any] = {"model": {"pretrained": "a/b"}, "data": {"train": [{"path": "x"}]}}


def mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from mappings(item)


def property_of(section: str, key: str) -> dict[str, Any]:
    schema = json_schema()
    found: dict[str, Any] = schema["$defs"][section]["properties"][key]
    return found


def test_the_schema_is_plain_json_with_a_dialect_and_a_title() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert (schema["$schema"], schema["title"]) == ("https://json-schema.org/draft/2020-12/schema", "steep run")
    assert schema["required"] == ["model", "data"]
    assert schema["additionalProperties"] is False


def test_every_reference_leads_to_a_definition() -> None:
    schema = json_schema()
    references = {found["$ref"] for found in mappings(schema) if isinstance(found.get("$ref"), str)}
    assert references
    assert references <= {f"#/$defs/{name}" for name in schema["$defs"]}


def test_no_limit_is_left_under_a_name_that_json_schema_does_not_know() -> None:
    named = [found for found in mappings(json_schema()) if {"ge", "gt", "le", "lt"} & set(found)]
    assert named == []


def test_every_key_and_section_is_described() -> None:
    schema = json_schema()
    assert [
        name for name, found in schema["properties"].items() if not found.get("description") and name != "trackers"
    ] == []
    for section, definition in schema["$defs"].items():
        if section != "Target":
            assert [key for key, found in definition["properties"].items() if not found.get("description")] == []


@pytest.mark.parametrize(
    ("section", "key", "parse", "good", "bad"),
    [
        (
            "TrainConfig",
            "tokens",
            parse_count,
            ["2B", "1.5 m", "500k", "2e9", "1,000", "1_000", ".5M"],
            ["2Q", "B", "-3", "2 B B"],
        ),
        ("TrainConfig", "max_seconds", parse_seconds, ["90s", "30min", "1.5h", "2 d", "90"], ["soon", "5 weeks"]),
        ("TrainConfig", "loss_chunk_bytes", parse_bytes, ["8GiB", "500 MB", "1024", "64mib"], ["big", "8 GiBs"]),
    ],
)
def test_numbers_as_people_write_them(section: str, key: str, parse: Any, good: list[str], bad: list[str]) -> None:
    found = list(mappings(property_of(section, key)))
    assert {"integer", "number"} & {item.get("type") for item in found if isinstance(item.get("type"), str)}
    (pattern,) = [item["pattern"] for item in found if "pattern" in item]
    for text in good:
        parse(text)
        assert re.search(pattern, text), text
    for text in bad:
        with pytest.raises(ValueError, match="is not a"):
            parse(text)
        assert not re.search(pattern, text), text


def test_limits_of_counts_are_kept() -> None:
    assert {"type": "integer", "minimum": 1} in list(mappings(property_of("TrainConfig", "steps")))


def test_a_component_is_a_section_or_a_target_and_an_empty_section_is_allowed() -> None:
    properties = json_schema()["properties"]
    assert {"$ref": "#/$defs/Target"} in properties["model"]["oneOf"]
    assert {"$ref": "#/$defs/Target"} in properties["optimizer"]["anyOf"]
    assert {"type": "null"} in properties["schedule"]["anyOf"]
    assert json_schema()["$defs"]["Target"]["required"] == ["_target_"]


def test_accepts_and_rejects_as_the_loader_does() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json_schema())
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid
    for good in ({}, {"train": {"tokens": "2B"}}, {"schedule": None}, {"model": {"_target_": "a.b", "x": 1}}):
        assert valid({**MINIMAL, **good}), good
    for bad in (
        {"train": {"lr": 1}},
        {"train": {"tokens": "2Q"}},
        {"trian": {}},
        {"model": {"pretraind": "x"}},
        {"trackers": [{}]},
    ):
        assert not valid({**MINIMAL, **bad}), bad


def test_the_reference_page_names_every_key_once_per_section() -> None:
    page = reference_markdown()
    sections = dict(zip(*[iter(re.split(r"^#+ `([^`]+)`.*\n", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    for location in all_keys():
        *path, key = ["<number>" if part == 0 else str(part) for part in location]
        if path:
            assert f"\n| `{key}` |" in sections[".".join(path)], location


def test_a_choice_beside_a_number_shows_both() -> None:
    page = reference_markdown()
    for row in ("`micro_batch_size` | `auto`, whole number at least 1 |", "`asynchronous` | `auto`, true or false |",
                "`tokens` | `auto`, count at least 1 |", "`targets` | `all-linear`, list of texts |"):  # fmt: skip
        assert f"| {row}" in page
    with pytest.raises(ConfigError, match="'few' is not a choice. It can be: auto, a whole number"):
        load_run_config(mapping={"train": {"micro_batch_size": "few"}})


def test_the_tables_of_the_reference_page_are_well_formed() -> None:
    rows = [line for line in reference_markdown().splitlines() if line.startswith("|")]
    assert len(rows) > 60
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_the_module_prints_the_page_without_torch() -> None:
    program = "import sys, runpy; runpy.run_module('steep.config.schema', run_name='__main__'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == reference_markdown()


def test_every_field_is_documented() -> None:
    from steep.config.run import RunConfig
    from steep.config.schema import document_sections, sections_below

    document_sections(RunConfig)
    silent = [
        f"{section.__name__}.{name}"
        for section in sections_below(RunConfig)
        if section is not RunConfig
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not silent
