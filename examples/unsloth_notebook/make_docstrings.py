"""Makes docstrings.jsonl from this Python installation only: the docstrings of the standard library, one per line."""

import ast
import inspect
import json
from pathlib import Path

SHORTEST, LONGEST = 150, 3000  # characters
LIBRARY = Path(inspect.__file__).parent


def docstrings() -> list[str]:
    """Every docstring of the library's top-level modules that is long enough to be a document, each once, in a fixed order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found: dict[str, None] = {}
    for path in sorted(LIBRARY.glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        texts = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        found.update(dict.fromkeys(text for text in texts if text and SHORTEST <= len(text) <= LONGEST))
    return list(found)


if __name__ == "__main__":
    texts = docstrings()
    Path("docstrings.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"docstrings.jsonl: {len(texts)} documents.")
