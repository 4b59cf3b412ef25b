"""The rules of the house, read from the source: who imports whom, what stays light, what a handler may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from house import LAYERS, House, room

import steep
from steep.core.plugins import plugin_names

ROOT = Path(steep.__file__).parent
HOUSE = House(ROOT)
FILES = sorted(ROOT.rglob("*.py"))

LONG_FUNCTIONS: dict[str, str] = {}
"""Functions over the limit outside cli, and why; at most three."""

MOST_LONG_FILES = 3

NO_TORCH = (
    "core",
    "config",
    "order",
    "sources",
    "tokenizer",
    "store",
    "metrics",
    "cli",
    "inspection",
    "launch",
    "__init__",
)
HEAVY = {"torch", "transformers", "pyarrow", "matplotlib", "tokenizers", "safetensors", "numpy"}

BROAD_HANDLERS = {
    "checkpoint/save.py": "sent to all ranks, which raise it: one that raised alone would leave the others waiting",
    "core/hub.py": "the client of the hub may be the user's own and raise anything; it is said as the reason",
    "cli/main.py": "usage errors of typer, whose class depends on its version; anything else is raised again",
    "loader.py": "handed to the thread that waits for it",
    "estimate/structure.py": "a model may do anything in its forward pass; the plan says that its figure is a guess, and why",
    "store/worker.py": "sent to the parent process, which raises it",
    "tokenizer/backend_choice.py": "a fast backend may fail in any way; the reference is used and the line printed says why",
}
"""Files that may catch Exception or BaseException without raising it in the same handler, and why."""

SILENT_HANDLERS = {"store/pool.py": "a worker's pipe was closed by kill; its end is reported right after"}
"""Files with an `except` whose body is `pass`, and why nothing is hidden."""

PLUGINS: dict[str, tuple[str, ...]] = {
    "optim.optimizers": ("build", "state_bytes"),
    "tokenizer.backends": ("build",),
    "trackers.backends": ("build",),
    "sources.formats": ("read",),
    "store.formats": ("sniff", "open"),
    "exporters.formats": ("check_task", "write", "verify"),
    "serving.servers": ("why_not", "command"),
}
"""Folders of plug-ins, and what every file in them must define; the contract tests say what that must do."""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def type_checking_nodes(tree: ast.Module) -> set[int]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {id(node) for block in blocks for node in ast.walk(block)}


def imported_packages(nodes: Iterator[ast.AST], skipped: set[int]) -> Iterator[str]:
    """The first names of what is imported. Raises AssertionError for relative imports, which hide the room they come from."""
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            yield str(node.module).split(".")[0]


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in HOUSE.modules} - {"__init__"} <= set(LAYERS)


def test_no_room_imports_one_above_it() -> None:
    wrong = [f"{found.importer} line {found.line}: {found.imported}" for found in HOUSE.upward]
    assert not wrong, f"upward, by the order of tests/architecture/house.py: {wrong}"


def test_no_files_import_each_other_in_a_circle() -> None:
    assert HOUSE.circles == []


def test_an_import_inside_a_function_says_why() -> None:
    wrong = [
        f"{found.importer} line {found.line}: {found.imported}" for found in HOUSE.local_imports if not found.explained
    ]
    assert not wrong, f"move it to the top of the file, or say in a comment why it stands in the function: {wrong}"


def test_functions_are_short() -> None:
    assert len(LONG_FUNCTIONS) <= 3
    assert {f"{function.module}.{function.name}" for function in HOUSE.long_functions} == set(LONG_FUNCTIONS)


def test_files_have_one_purpose() -> None:
    assert len(HOUSE.long_files) <= MOST_LONG_FILES, HOUSE.long_files


def top_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Everything that runs when the module is imported: not the bodies of functions."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += list(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", [p for p in FILES if stage_of(p) in NO_TORCH], ids=name_of)
def test_no_torch_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    heavy = set(imported_packages(top_level(tree), type_checking_nodes(tree))) & {"torch", "transformers"}
    assert not heavy, f"{name_of(path)} imports {heavy} when it is imported"


def imported_by(code: str) -> set[str]:
    """Top-level packages in sys.modules of a new process after `code`."""
    program = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.split())


def test_importing_steep_and_its_command_is_light() -> None:
    assert not imported_by("import steep, steep.cli.main") & HEAVY


def test_reading_a_configuration_and_the_data_side_needs_no_torch() -> None:
    modules = ["config.load", "config.schema", "core.targets", "store.prepare", "store.cache", "order.data_order",
               "tokenizer.open", "sources.formats.jsonl", "inspection", "order.batches", "optim.schedule", "core.lock",
               "checkpoint.compare", "runtime.ranks", "runtime.run_directory"]  # fmt: skip
    loaded = imported_by("import " + ", ".join(f"steep.{module}" for module in modules))
    assert not loaded & {"torch", "transformers"}


def test_the_loop_is_short() -> None:
    assert len((ROOT / "training" / "loop.py").read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("package", PLUGINS)
def test_the_file_name_of_a_plugin_is_its_name(package: str) -> None:
    names = plugin_names(f"steep.{package}")
    assert names
    for name in names:
        tree = HOUSE.trees[f"{package}.{name}"]
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(PLUGINS[package]) <= defined, f"{package}.{name} lacks {set(PLUGINS[package]) - defined}"


def handlers(path: Path) -> list[ast.ExceptHandler]:
    return [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ExceptHandler)]


def is_broad(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and (last.exc is None or last.cause is not None)


def test_no_handler_hides_an_error() -> None:
    found = {name_of(path) for path in FILES for h in handlers(path) if is_broad(h) and not raises_again(h)}
    assert found == set(BROAD_HANDLERS)


def test_no_handler_is_silent() -> None:
    found = {name_of(path) for path in FILES for h in handlers(path) if all(isinstance(n, ast.Pass) for n in h.body)}
    assert found == set(SILENT_HANDLERS)


PROTOCOLS = {
    node.name: {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
    for tree in HOUSE.trees.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
}
"""The methods of every protocol, which documents them for the classes that name it as their base."""


def public_definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    bases = tree.bases if isinstance(tree, ast.ClassDef) else []
    documented = {name for base in bases for name in PROTOCOLS.get(ast.unparse(base), ())}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if node.name not in documented:
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    missing = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing, f"{name_of(path)}: no docstring: {', '.join(missing)}"
