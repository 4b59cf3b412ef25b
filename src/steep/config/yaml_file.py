"""YAML text -> plain data and the line of every key, read as people expect it.

Differences from PyYAML's `safe_load`, each because the other reading has cost someone a run:
`1e-4` is a number; only true and false are booleans (`no`, `off`, `yes` and `on` stay text); `010` is ten, not eight;
`1:30` and `2024-01-01` stay text; keys are always text, as in JSON; a key given twice is an error (PyYAML takes
the last one); tags are refused; aliases that would expand to more than MAX_NODES values are refused.
No torch. Raises nothing: problems are in `YamlText.problems`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Union

import yaml

MAX_NODES = 100_000
MAX_BYTES = 5_000_000

Location = tuple[Union[str, int], ...]

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_PREFIX = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """PyYAML's parser with this module's rules for plain scalars."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads: quotes every text that either this module or stock YAML 1.1 would misread."""

    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012 - PyYAML's own attribute
        first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Values that occur twice are written twice: a person reads the file."""
        return True


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(_PREFIX + "null", re.compile(f"(?:{_NULL.pattern})$"), ["~", "n", "N", ""])
    _class.add_implicit_resolver(_PREFIX + "bool", re.compile(f"(?:{_BOOLEAN.pattern})$"), list("tTfF"))
    _class.add_implicit_resolver(_PREFIX + "int", re.compile(f"(?:{_INTEGER.pattern})$"), list("-+0123456789"))
    _class.add_implicit_resolver(_PREFIX + "float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+.0123456789"))
    _class.add_implicit_resolver(_PREFIX + "merge", re.compile(r"<<$"), ["<"])


def read_scalar(text: str) -> Any:
    """The value of an unquoted scalar: null, boolean, integer, float or the text itself."""
    if _NULL.fullmatch(text):
        return None
    if _BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    if _INTEGER.fullmatch(text):
        digits = text.replace("_", "")
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2].lower(), 10)
        return int(digits, base) if len(digits) < 1000 else text
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


@dataclass
class YamlText:
    """What a YAML text holds. `lines` maps the location of each key and list item to its line, counted from 1."""

    data: Any = None
    lines: dict[Location, int] = field(default_factory=dict)
    written: dict[Location, str] = field(default_factory=dict)
    problems: list[tuple[int, Location, str]] = field(default_factory=list)
    """(line, location, message); a syntax error has the location ()."""


def parse_yaml(text: str) -> YamlText:
    """Read one YAML document. Every problem found is in `.problems`; `.data` is what could be read."""
    result = YamlText()
    try:
        node = Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        result.problems.append(_syntax_problem(error, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        result.problems.append(
            (line, (), f"the character U+{error.character:04X} is not allowed in YAML; is this a text file?")
        )
    except RecursionError:
        result.problems.append((1, (), "lists or mappings are nested too deeply to be a configuration"))
    else:
        if node is not None:
            _Reader(result).read_document(node)
    return result


class _TooMany(Exception):
    """The document expands to more than MAX_NODES values."""


class _Reader:
    """Turns PyYAML's node graph into plain data, counting every expanded node."""

    def __init__(self, result: YamlText):
        self.result = result
        self.count = 0
        self.open: set[int] = set()

    def read_document(self, node: Any) -> None:
        try:
            self.result.data = self.read(node, ())
        except _TooMany:
            self.problem(node, (), f"its anchors and aliases expand to more than {MAX_NODES:,} values; write them out")
        except RecursionError:
            self.problem(node, (), "lists or mappings are nested too deeply to be a configuration")

    def problem(self, node: Any, location: Location, message: str) -> None:
        self.result.problems.append((node.start_mark.line + 1, location, message))

    def read(self, node: Any, location: Location) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise _TooMany
        is_scalar, wrong = isinstance(node, yaml.ScalarNode), ""
        kinds = ("str", "null", "bool", "int", "float", "merge") if is_scalar else ("map", "seq")
        if id(node) in self.open:
            wrong = "an alias points to the value that contains it"
        elif node.tag not in [_PREFIX + kind for kind in kinds]:
            wrong = f"the tag {node.tag.replace(_PREFIX, '!!')} is not understood; write plain values without tags"
        if wrong:
            self.problem(node, location, wrong)
            return None
        if node.tag == _PREFIX + "str":
            return node.value
        if is_scalar:
            self.result.written[location] = node.value
            return read_scalar(node.value)
        self.open.add(id(node))
        try:
            return self.read_collection(node, location)
        finally:
            self.open.discard(id(node))

    def read_collection(self, node: Any, location: Location) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, location)
        for position, item in enumerate(node.value):
            self.result.lines.setdefault((*location, position), item.start_mark.line + 1)
        return [self.read(item, (*location, position)) for position, item in enumerate(node.value)]

    def read_mapping(self, node: Any, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        merged: list[Any] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(
                    key_node, location, "a key must be text, not a list or mapping (a text with [ or { needs quotes)"
                )
                continue
            if key_node.tag == _PREFIX + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key, here = key_node.value, (*location, key_node.value)
            if key in first_lines:
                self.problem(
                    key_node, here, f"is given twice, in line {first_lines[key]} and in line {line}; keep one of them"
                )
                continue
            first_lines[key] = line
            self.result.lines[here] = line
            values[key] = self.read(value_node, here)
        for value_node in merged:
            self.merge(value_node, values, location)
        return values

    def merge(self, node: Any, values: dict[str, Any], location: Location) -> None:
        """The YAML merge key `<<`: keys of `node` that the mapping does not have itself."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, location, "`<<` merges a mapping or a list of mappings, such as *name")
            return
        kept_lines, kept_written = dict(self.result.lines), dict(self.result.written)
        for key, value in self.read(node, location).items():
            values.setdefault(key, value)
        self.result.lines.update(kept_lines)
        self.result.written.update(kept_written)


_HINTS = (
    ("found character '\\t'", "indent with spaces, not with tabs"),
    ("while scanning an alias", "a text that starts with * needs quotes: '*.jsonl'"),
    ("found undefined alias", "a text that starts with * needs quotes, as in '*.jsonl'"),
    ("while scanning an anchor", "a text that starts with & needs quotes"),
    ("mapping values are not allowed here", "a text with ': ' in it needs quotes; keys of one mapping start in one column"),
    ("could not find expected ':'", "a key needs a colon and a space after it: `key: value`"),
    ("found unexpected end of stream", "a quote is opened and not closed"),
    ("expected ',' or '}'", "a mapping in braces needs commas between its entries and a } at its end"),
    ("expected ',' or ']'", "a list in brackets needs commas between its entries and a ] at its end"),
    ("but found '<block mapping start>'", "a key must be indented like its neighbours"),
    ("expected <block end>", "keys of one mapping must start in the same column"),
    ("but found another document", "a configuration is one document: remove the `---` between"),
    ("that cannot start any token", "a text that starts with % @ or ` needs quotes"),
)  # fmt: skip


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> tuple[int, Location, str]:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    said = " ".join(part for part in (error.context, error.problem) if part)
    message = f"this is not valid YAML: {error.problem or error.context}"
    if error.context and error.problem:
        opened = f" that starts in line {error.context_mark.line + 1}" if error.context_mark else ""
        message += f" ({error.context}{opened})"
    hint = next((hint for words, hint in _HINTS if words in said), None)
    lines = text.splitlines()
    source = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    quoted = f"; the line is `{source[:100]}`" if source else ""
    return line, (), f"{message}{quoted}" + (f". {hint[0].upper()}{hint[1:]}." if hint else "")
