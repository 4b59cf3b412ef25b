"""What is exported is what was trained: loaded in another process by transformers alone, logits compared."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

import steep
from steep.core.errors import ConfigError, ModelError
from support import run_mapping


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path) -> Path:
    from steep.config.load import load_run_config
    from steep.training.loop import train

    mapping = run_mapping(tmp_path_factory.mktemp("export"), corpus_directory, tiny_tokenizer_directory)
    return train(load_run_config(mapping=mapping), stream=io.StringIO()).run_directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_loads_in_transformers_with_equal_logits(run: Path, dtype: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = steep.export(str(run), dtype=dtype, out=tmp_path / "hf", max_shard_size="20KB")
    assert result.largest_logit_difference <= (1e-5 if dtype == "float32" else 1e-2)
    assert abs(result.loss_change) < (1e-6 if dtype == "float32" else 1e-2)
    model = AutoModelForCausalLM.from_pretrained(result.path, dtype="auto")
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(result.path).eos_token_id == 0
    assert len(list(result.path.glob("model-*.safetensors"))) > 1  # sharded, as asked
    card = (result.path / "README.md").read_text()
    for part in ("## Data", "## Training", "## Held-out scores", "heldout"):
        assert part in card


def test_export_refuses_to_replace_and_unknown_settings(run: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        steep.export(str(run), out=tmp_path / "there")
    with pytest.raises(ConfigError, match="float16"):
        steep.export(str(run), out=tmp_path / "x", dtype="fp8")
    with pytest.raises(ConfigError, match="there is no 'hff'.*Did you mean 'hf'"):
        steep.export(str(run), out=tmp_path / "x", to="hff")
    assert not (tmp_path / "x").exists()


def test_a_changed_export_fails_the_verification(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from steep.exporters.format import Options
    from steep.exporters.run import ask_trained, open_task

    with open_task(str(run), "hf", Options(dtype="f32")) as (exporter, task):
        ask_trained(task)
        folder = tmp_path / "hf"
        expected = exporter.write(task, folder)
        exporter.verify(task, folder, expected)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"] *= 1.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="is not the trained model"):
            exporter.verify(task, folder, expected)
        (folder / "config.json").write_text("{}")
        with pytest.raises(ModelError, match="does not load in a new process"):
            exporter.verify(task, folder, expected)


def test_evaluate_repeats_the_runs_own_scores(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    [score] = steep.evaluate(str(run), precision="fp32").scores
    after = summary["texts"]["heldout"]["after"]
    assert score.nats_per_token == pytest.approx(after["nats_per_token"], rel=1e-6)
    assert score.bits_per_byte == pytest.approx(after["bits_per_byte"], rel=1e-6)


def test_the_precision_that_auto_chose_is_said_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steep.evaluate(run, against=run, tokens=200, device="cpu")
    steep.generate(run, "The", max_new_tokens=1, device="cpu")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("precision auto: ")]
    assert len(lines) == 2
    assert len(set(lines)) == 1 or "other processes" in "".join(lines)  # a busy machine is measured again
    steep.evaluate(run, tokens=200, device="cpu", precision="fp32")
    assert "precision auto" not in capsys.readouterr().err


def test_evaluate_against_another_model_and_named_texts(run: Path, corpus_directory: Path) -> None:
    text = min(corpus_directory.glob("*.txt"))
    result = steep.evaluate(str(run), {"page": str(text)}, against=str(run), precision="fp32")
    assert result.against_scores is not None
    assert result.scores[0].bits_per_byte == result.against_scores[0].bits_per_byte
    assert "+0.00 %" in repr(result)
    with pytest.raises(ModelError, match="fresh weights"):
        steep.evaluate(str(run), against="base")


def test_generate_of_a_run_and_of_its_export_are_equal(run: Path, tmp_path: Path) -> None:
    result = steep.export(str(run), dtype="float32", out=tmp_path / "hf")
    texts = [steep.generate(str(path), "The with", max_new_tokens=8, precision="fp32") for path in (run, result.path)]
    assert texts[0] == texts[1]


def test_overwrite_replaces_an_export_and_nothing_else(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    steep.export(str(run), out=folder)
    steep.export(str(run), out=folder, overwrite=True)
    (folder / "thesis.docx").write_text("mine")
    with pytest.raises(ConfigError, match=r"more than an export in it \(thesis.docx\)"):
        steep.export(str(run), out=folder, overwrite=True)
    assert (folder / "thesis.docx").exists()


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt])
def test_an_export_that_fails_or_is_interrupted_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def verify(task: object, folder: Path, expected: object) -> None:
        assert (folder / "model.safetensors").is_file()
        raise error

    monkeypatch.setattr("steep.exporters.formats.hf.verify", verify)
    with pytest.raises(error):
        steep.export(str(run), out=tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = copy / "checkpoints" / (copy / "checkpoints" / "LATEST").read_text().strip() / "model"
    for file in newest.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        file.write_bytes(data)
    steep.evaluate(copy, precision="fp32")  # a path object works too
    assert "cannot be used" in capsys.readouterr().err


def test_nf4_that_this_cpu_cannot_run_is_refused_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the extra quant is not installed")
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    with pytest.raises(ModelError, match="multiple of 64; this model has 12 others, such as q_proj of 32"):
        steep.export(str(run), out=tmp_path / "nf4", quantize="nf4")
    assert list(tmp_path.iterdir()) == []
