"""The scripts in benchmarks/ run: on small sizes, as the commands that their README names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.name for path in BENCHMARKS.glob("*.py") if path.name != "common.py")


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A benchmark as a process, from another folder than its own."""
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def in_common(code: str) -> str:
    """The output of code that runs beside benchmarks/common.py: `common` is no name to put on this process's path."""
    result = subprocess.run(
        [sys.executable, "-c", f"from common import *\n{code}"],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        timeout=120,
        check=True,
    )
    return result.stdout


def test_the_readme_names_every_script() -> None:
    named = set(
        re.findall(r"`(?:python benchmarks/)?(\w+\.py)", (BENCHMARKS / "README.md").read_text(encoding="utf-8"))
    )
    assert named == set(SCRIPTS)


def test_the_readme_links_results_that_exist() -> None:
    linked = re.findall(r"\]\((results/[^)#]+)", (BENCHMARKS / "README.md").read_text(encoding="utf-8"))
    assert linked
    assert [path for path in linked if not (BENCHMARKS / path).is_file()] == []


def test_a_table_and_a_spread() -> None:
    code = "print(table(['way', 'a'], [['x', spread([3.0, 1.0, 2.0], '.1f')]]))"
    assert in_common(code) == "| way | a |\n| --- | ---: |\n| x | 2.0 (1.0-3.0) |\n"


def test_peak_memory_is_the_measured_process_s_own() -> None:
    code = (
        "import json, sys\n"
        "big = [sys.executable, '-c', 'x = bytearray(b\"1\") * (300 << 20); print(len(x))']\n"
        "small = [sys.executable, '-c', 'print(1)']\n"
        "print(json.dumps([run_process(c).peak_bytes for c in (big, small)] + [run_process(big).output]))"
    )
    big, small, output = json.loads(in_common(code))
    assert big - small == pytest.approx(300 << 20, rel=0.05)
    assert int(output) == 300 << 20


def test_a_failed_process_shows_its_error() -> None:
    code = "run_process([sys.executable, '-c', 'raise ValueError(\"said why\")'])"
    result = subprocess.run(
        [sys.executable, "-c", f"from common import *\n{code}"],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "said why" in result.stderr


def test_a_synthetic_store_is_a_store(tmp_path: Path) -> None:
    in_common(f"write_store(Path({str(tmp_path)!r}) / 'store', 1000, document_tokens=50, documents=20)")
    from steep.store.reader import open_store

    store = open_store(tmp_path / "store.bin")
    assert (store.num_documents, store.num_tokens) == (20, 1000)
    assert 500 < store.max_token_id < 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself(script: str) -> None:
    result = run(script, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python benchmarks/{script}" in result.stdout


@pytest.mark.slow
def test_loss_parity_holds() -> None:
    result = run("loss_parity.py", "--steps", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^\| (?:gpt2|llama) \| 4 \|", result.stdout, re.MULTILINE)) == 2


@pytest.mark.slow
def test_help_is_measured_and_needs_no_torch() -> None:
    result = run("startup.py", "--repeats", "1", "--skip-resume")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| steep --help \| .* \| no \|$", result.stdout, re.MULTILINE)


@pytest.mark.slow
def test_prepare_is_measured_on_real_text(tiny_tokenizer_directory: Path, tmp_path: Path) -> None:
    sizes = ["--size", "2MB", "--slow-size", "1MB", "--repeats", "1", "--work", str(tmp_path / "work")]
    folder = str(Path(json.__file__).parent.parent)
    result = run("prepare.py", *sizes, "--root", folder, "--tokenizer", str(tiny_tokenizer_directory))
    assert result.returncode == 0, result.stderr
    assert "Corpus: 2 MB of JSONL" in result.stdout
    assert len(re.findall(r"^\| steep, (?:gigatoken|huggingface), [12] process", result.stdout, re.MULTILINE)) == 3
