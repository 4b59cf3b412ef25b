"""The rules of the house, read from the source: who imports whom, what stays light, what a handler may not do."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import steep

ROOT = Path(steep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

MAY_IMPORT_ALL = {"train", "unsloth", "cli", "api", "demo", "inspection", "__main__", "__init__"}
"""They put stages together; no stage imports them, but for the exceptions below."""

ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "sources": {"core"},
    "tokenizer": {"core", "models.config"},
    "store": {"core", "sources", "tokenizer"},
    "order": {"core", "sources.config", "store.config"},
    "batch": {"core"},
    "loader": {"core", "batch", "order", "train.sizes"},
    "loss": {"core"},
    "models": {"core", "batch", "loss", "config", "parallelize", "optim.load"},
    "optim": {"core", "config.targets"},
    "parallelize": {"core", "models"},
    "runtime": {"core"},
    "metrics": {"core"},
    "trackers": {"core", "metrics"},
    "checkpoint": {"core"},
    "report": {"core", "metrics", "trackers", "evaluate.forgetting", "evaluate.end_of_text"},
    "evaluate": {
        "core", "batch", "loader", "order", "sources", "store", "tokenizer", "models", "metrics", "checkpoint", "config",
        "runtime", "train.data", "train.run_directory",
    },
    "merge": {
        "core", "checkpoint", "evaluate", "export", "models", "optim.ema", "report", "tokenizer", "runtime",
        "train.run_directory",
    },
    "export": {"core", "checkpoint.load", "evaluate", "models", "tokenizer", "runtime", "train.run_directory"},
}  # fmt: skip
"""What a stage (a folder or file below src/steep) may import of ours besides itself: `a.b` allows that module alone."""

EXCEPTIONS = {("core/callable_module.py", "steep.api")}
"""(file, import): `steep.train(...)` asks the API when it is called."""

NO_TORCH = ("order", "store", "sources", "config", "tokenizer", "core", "cli", "metrics", "inspection", "api")
HEAVY = {"torch", "transformers", "pyarrow", "matplotlib", "tokenizers", "safetensors", "numpy"}

BROAD_HANDLERS = {
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
    "optim": ("ema", "param_groups", "schedule", "load", "config"),
    "tokenizer.backends": (),
    "trackers": ("config", "sinks", "tracker"),
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def stage_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else path.stem


def type_checking_nodes(tree: ast.Module) -> set[int]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING"))
    return {id(node) for block in blocks for node in ast.walk(block)}


def imports(nodes: Iterator[ast.AST] | list[ast.stmt], skipped: set[int]) -> Iterator[str]:
    """Dotted names of what is imported: `from steep.a import b` gives steep.a.b if that is a module, else steep.a."""
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import: {ast.unparse(node)}"
            for alias in node.names:
                path = ROOT.parent.joinpath(*f"{node.module}.{alias.name}".split("."))
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)


def is_allowed(name: str, importer: Path) -> bool:
    stage = stage_of(importer)
    target = name.removeprefix("steep").removeprefix(".")
    if stage in MAY_IMPORT_ALL or target in ("", "__version__") or (name_of(importer), name) in EXCEPTIONS:
        return True
    if name_of(importer) == "config/run.py" and target.endswith(".config"):
        return True  # it assembles the sections that live beside what they configure
    own = target.split(".")[0] == stage
    return own or any(target == a or target.startswith(f"{a}.") for a in ALLOWED[stage])


def test_every_stage_is_in_the_table() -> None:
    assert {stage_of(path) for path in FILES} <= MAY_IMPORT_ALL | ALLOWED.keys()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_of_a_stage(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [name for name in imports(ast.walk(tree), type_checking_nodes(tree)) if name.split(".")[0] == "steep"]
    wrong = sorted({name for name in names if not is_allowed(name, path)})
    assert not wrong, (
        f"{name_of(path)} imports {', '.join(wrong)}; {stage_of(path)} may import {ALLOWED[stage_of(path)]}"
    )


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
    heavy = {name.split(".")[0] for name in imports(top_level(tree), type_checking_nodes(tree))} & {
        "torch",
        "transformers",
    }
    assert not heavy, f"{name_of(path)} imports {heavy} when it is imported"


def imported_by(code: str) -> set[str]:
    """Top-level packages in sys.modules of a new process after `code`."""
    program = f"{code}\nimport sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(result.stdout.split())


def test_importing_steep_and_its_command_is_light() -> None:
    assert not imported_by("import steep, steep.api, steep.cli.main") & HEAVY


def test_reading_a_configuration_and_the_data_side_needs_no_torch() -> None:
    modules = ["config.load", "config.schema", "config.targets", "store.prepare", "store.cache", "order.plan", "tokenizer.load",
               "sources.jsonl", "inspection", "train.sizes",
               "optim.schedule", "checkpoint.lock", "checkpoint.compare"]  # fmt: skip
    loaded = imported_by("import " + ", ".join(f"steep.{module}" for module in modules))
    assert not loaded & {"torch", "transformers"}


def test_the_loop_is_short() -> None:
    assert len((ROOT / "train" / "loop.py").read_text(encoding="utf-8").splitlines()) < 200


@pytest.mark.parametrize("package", PLUGINS)
def test_the_file_name_of_a_plugin_is_its_name(package: str) -> None:
    from steep.core.plugins import load_plugin, plugin_names

    names = plugin_names(f"steep.{package}", exclude=PLUGINS[package])
    assert names
    for name in names:
        module = load_plugin(f"steep.{package}", name, exclude=PLUGINS[package])
        assert callable(module.build), f"{module.__name__} has no build()"


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


def public_definitions(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    missing = [name for name, node in public_definitions(tree) if not ast.get_docstring(node)]  # type: ignore[arg-type]
    assert not missing, f"{name_of(path)}: no docstring: {', '.join(missing)}"


def test_the_api_documents_every_argument() -> None:
    api = importlib.import_module("steep.api")
    for name in (n for n in steep.__all__ if n != "__version__"):
        function = getattr(api, name)
        assert inspect.signature(function).return_annotation not in (inspect.Signature.empty, None)
        assert len((function.__doc__ or "").split()) > 10, name
