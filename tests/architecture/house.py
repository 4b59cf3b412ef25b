"""The house measured: lines, functions, who imports whom. Run it to see the figures of a source tree, or of several side by side:

    python tests/architecture/house.py [path/to/src/steep ...]

In: the folder of the package. Out: figures, and for `test_structure.py` the arrows and circles behind them. Only the source is
read; nothing is imported.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LAYERS = (
    "core", "runtime", "config", "order", "sources", "tokenizer", "store", "batch", "metrics", "loader", "loss", "models",
    "optim", "parallelize", "checkpoint", "data", "trackers", "evaluation", "estimate", "reporting", "exporters", "serving",
    "merge", "training", "api", "inspection", "starter", "unsloth", "demo", "cli", "__main__",
)  # fmt: skip
"""The rooms from the floor up. A room imports those before it; `order` is integers only, so `store` may use it."""

FORMER_NAMES = {"train": "training", "evaluate": "evaluation", "export": "exporters", "report": "reporting"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
REASON = re.compile(r"#\s*(?!noqa|type:|fmt:)\S")
"""A comment for people, as opposed to one for a tool."""


@dataclass(frozen=True)
class Import:
    """One import of a module of ours."""

    importer: str
    """Dotted, below steep."""
    imported: str
    line: int
    in_function: bool
    explained: bool
    """Whether a comment on its line, or above the block of imports that it stands in, says why it is there."""


@dataclass(frozen=True)
class Function:
    """A function or method with its length in lines."""

    module: str
    name: str
    lines: int


class House:
    """The package in `root`, read once."""

    def __init__(self, root: Path):
        self.root = root
        self.modules = {_dotted(path, root): path for path in sorted(root.rglob("*.py"))}
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in self.modules.items()}

    @cached_property
    def lines(self) -> dict[str, int]:
        """Lines of each file."""
        return {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in self.modules.items()}

    @cached_property
    def functions(self) -> list[Function]:
        """Every function and method."""
        return [
            Function(module, node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
            for module, tree in self.trees.items()
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import of ours that runs: those for type checkers alone do not."""
        return [found for name in self.modules for found in self._imports_of(name)]

    def _imports_of(self, name: str) -> Iterator[Import]:
        text = self.modules[name].read_text(encoding="utf-8").splitlines()
        for node, in_function in _running(self.trees[name]):
            for target in self._targets(node):
                yield Import(name, target, node.lineno, in_function, _is_explained(text, node))

    def _targets(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] != "steep":
                continue
            below = name.partition(".")[2]
            while below and below not in self.modules:
                below = below.rpartition(".")[0]
            yield below or "__init__"

    @property
    def upward(self) -> list[Import]:
        """Imports of a room above the importer's own; any room may import a section of the configuration (`*.config`)."""
        return [found for found in self.imports if self._is_upward(found)]

    def _is_upward(self, found: Import) -> bool:
        if found.imported == "__init__" or found.imported.endswith(".config") or found.importer == "__init__":
            return False
        return LAYERS.index(room(found.importer)) < LAYERS.index(room(found.imported))

    @property
    def upward_arrows(self) -> set[tuple[str, str]]:
        """(room, room above it) for every pair with at least one upward import."""
        return {(room(found.importer), room(found.imported)) for found in self.upward}

    @property
    def circles(self) -> list[list[str]]:
        """Groups of files that import each other, at the top of a file or inside functions."""
        edges: dict[str, set[str]] = {name: set() for name in self.modules}
        for found in self.imports:
            if found.imported != "__init__" and found.importer != "__init__" and found.importer != found.imported:
                edges[found.importer].add(found.imported)
        return sorted(sorted(group) for group in _strongly_connected(edges) if len(group) > 1)

    @property
    def local_imports(self) -> list[Import]:
        """Imports of ours inside functions."""
        return [found for found in self.imports if found.in_function]

    @property
    def long_files(self) -> dict[str, int]:
        """Files over the limit."""
        return {name: lines for name, lines in self.lines.items() if lines > LONGEST_FILE}

    @property
    def long_functions(self) -> list[Function]:
        """Functions over the limit, those of the command line left out: their length is their options."""
        return [f for f in self.functions if f.lines > LONGEST_FUNCTION and room(f.module) != "cli"]

    def figures(self) -> dict[str, str]:
        """What is shown, by name."""
        lengths = sorted(function.lines for function in self.functions)
        percentile_95 = lengths[int(0.95 * len(lengths))]
        unexplained = sum(not found.explained for found in self.local_imports)
        return {
            "files": f"{len(self.modules):,}",
            "lines": f"{sum(self.lines.values()):,}",
            "functions": f"{len(lengths):,}",
            "lines of a function: median, 95th percentile, longest": (
                f"{statistics.median(lengths):.0f}, {percentile_95}, {lengths[-1]}"
            ),
            f"functions over {LONGEST_FUNCTION} lines outside cli": str(len(self.long_functions)),
            f"files over {LONGEST_FILE} lines": str(len(self.long_files)),
            "upward arrows between rooms (imports)": f"{len(self.upward_arrows)} ({len(self.upward)})",
            "import circles": str(len(self.circles)),
            "local imports of ours (without a reason)": f"{len(self.local_imports)} ({unexplained})",
        }


def room(module: str) -> str:
    """The folder or file below steep that a module belongs to, by its name of today."""
    first = module.split(".")[0]
    return FORMER_NAMES.get(first, first)


def _dotted(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _running(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import that can run, and whether it stands in a function."""
    waiting: list[tuple[ast.AST, bool]] = [(tree, False)]
    while waiting:
        node, inside = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node, inside
        elif not (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")):
            inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            waiting += [(child, inside) for child in ast.iter_child_nodes(node)]


def _is_explained(text: list[str], node: ast.stmt) -> bool:
    if any(REASON.search(line) for line in text[node.lineno - 1 : node.end_lineno]):
        return True
    number = node.lineno - 2
    while number >= 0 and (text[number].strip().startswith(("from ", "import ", ")")) or text[number].endswith(",")):
        if REASON.search(text[number]):
            return True
        number -= 1
    return number >= 0 and text[number].strip().startswith("#")


def _strongly_connected(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other. Two nodes do if each is among what the other reaches."""
    reached = {start: _reachable(start, edges) for start in edges}
    groups: list[list[str]] = []
    placed: set[str] = set()
    for start in edges:
        if start not in placed:
            group = [start, *(other for other in reached[start] if other != start and start in reached[other])]
            placed |= set(group)
            groups.append(group)
    return groups


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges.get(node, ())
    return found


def main() -> None:
    """Print the figures of every tree that is named, by default of this one."""
    here = Path(__file__).parents[2] / "src" / "steep"
    houses = [House(Path(argument)) for argument in sys.argv[1:]] or [House(here)]
    columns = [house.figures() for house in houses]
    for name in columns[0]:
        print(f"{name:<58}" + "".join(f"{column.get(name, ''):>20}" for column in columns))
    if len(houses) == 1:
        for found in houses[0].upward:
            print(f"upward: {found.importer}:{found.line} imports {found.imported}")
        for circle in houses[0].circles:
            print(f"circle: {' <-> '.join(circle)}")
        for function in houses[0].long_functions:
            print(f"long function: {function.module}.{function.name}, {function.lines} lines")
        for name, lines in houses[0].long_files.items():
            print(f"long file: {name}, {lines} lines")


if __name__ == "__main__":
    main()
