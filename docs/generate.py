"""Write the pages of docs/reference/ that come from the code: `make docs`.

In: the section models and the table of metrics. Out: configuration.md and metrics.md. A test compares the pages with what this
would write, so a changed docstring without `make docs` fails.
"""

from __future__ import annotations

from pathlib import Path

from steep import metrics
from steep.config import schema
from steep.core.files import write_text

REFERENCE = Path(__file__).parent / "reference"


def pages() -> dict[Path, str]:
    """The generated pages by path, as they should be."""
    return {
        REFERENCE / "configuration.md": schema.reference_markdown(),
        REFERENCE / "metrics.md": metrics.reference_markdown().rstrip() + "\n",
    }


def main() -> None:
    """Write every page and say so."""
    for path, text in pages().items():
        write_text(path, text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
