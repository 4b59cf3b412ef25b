"""The documentation builds as a site, and what it says of itself agrees: citation, version, one GPT-2 in all pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from markdown_pages import ROOT, all_blocks


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={"PATH": "", "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    wanted = {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page.replace("README.html", "index.html") for page in wanted} <= pages
    assert "repository/examples/index.html" in pages  # a page outside docs/ that a page links to


def test_the_citation_names_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    installed = metadata("steep")
    assert str(citation["version"]) == installed["Version"]
    assert citation["license"] == installed["License-Expression"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_readme_tutorial_and_example_have_one_gpt2() -> None:
    blocks = {(block.page, block.name): yaml.safe_load(block.text) for block in all_blocks() if block.kind == "file"
              and block.name.endswith(".yaml")}  # fmt: skip
    readme = blocks["README.md", "gpt2.yaml"]
    assert readme == blocks["docs/tutorials/gpt2_from_scratch.md", "run.yaml"]
    example = yaml.safe_load((ROOT / "examples" / "gpt2_from_scratch" / "run.yaml").read_text(encoding="utf-8"))
    assert (readme["model"], readme["optimizer"]) == (example["model"], example["optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted(ROOT.glob("examples/*/*.ipynb")), ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_run_one_after_the_other(notebook: Path, tmp_path: Path) -> None:
    made = shutil.ignore_patterns("runs", "text", "tokenizer", "tokens")
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=made)
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    program = "\n".join(
        "".join(cell["source"]) for cell in cells
    )  # one program: a cell uses the names of those before it
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "run_blocks.py")], input=json.dumps([["python", program]]),
        cwd=tmp_path / "examples" / notebook.parent.name, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "examples" / notebook.parent.name / "runs" / "notebook" / "report.html").is_file()
