"""Blend, average and restore-instruct by the real command, on a run of a few seconds that continues another one."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import steep
from steep.checkpoint.load import open_checkpoint
from steep.core.errors import ConfigError, ModelError
from steep.evaluation.model_reference import config_of_run
from steep.merge.average import shares_of
from steep.merge.blend import BlendPoint, choose
from steep.merge.scored import known_scores
from steep.merge.weights import combine, open_weights
from steep.models.fresh import build_fresh
from support import LLAMA, run_mapping
from support import steep as command

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> list[Path]:
    folder = tmp_path_factory.mktemp("merge")
    first = run_mapping(folder, corpus_directory, tiny_tokenizer_directory, run={"name": "first"})
    steep.train(first)
    base = folder / "base"
    steep.export(str(folder / "runs/first"), out=base, dtype="float32")
    second = run_mapping(
        folder, corpus_directory, tiny_tokenizer_directory, run={"name": "second"}, model={"pretrained": str(base)},
        checkpoint={"keep_last": 3},
    )  # fmt: skip
    steep.train(second)
    return [base, folder / "runs/second"]


@pytest.fixture(scope="module", params=[pytest.param("untied", marks=pytest.mark.slow), "tied, embeddings trained"])
def adapter_run(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    corpus_directory: Path,
    tiny_tokenizer_directory: Path,
) -> tuple[Path, Path]:
    """A base and a run that trained an adapter on it, with a moving average."""
    folder = tmp_path_factory.mktemp("adapter")
    tied = request.param != "untied"
    build_fresh({**LLAMA, "tie_word_embeddings": tied}, None, seed=1).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(folder / "base")
    mapping = run_mapping(
        folder, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(folder / "base")},
        adapter={"rank": 4, "modules_to_save": ["embed_tokens"] if tied else []}, train={"ema_decay": 0.5},
        optimizer={"learning_rate": 1e-2}, checkpoint={"keep_last": 3},
    )  # fmt: skip
    return folder / "base", steep.train(mapping).run_directory


def merged_by_peft(base: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(checkpoint / "model/consolidated")
    )
    return model.merge_and_unload().state_dict()  # type: ignore[operator,no-any-return]


def test_an_adapter_is_combined_as_the_model_that_peft_makes_of_it(
    adapter_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = adapter_run
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    merged = [merged_by_peft(base, folder) for folder in sorted((run / "checkpoints").glob("epoch*"))]
    start = load_file(base / WEIGHTS)
    weights = [open_weights(str(base), print), open_weights(str(run), print)]
    half = combine(weights, [0.5, 0.5])
    assert half.keys() == start.keys()
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, (start[name] + merged[-1][name]) / 2, rtol=1e-5, atol=1e-7)
    assert all(torch.equal(tensor, start[name]) for name, tensor in combine(weights, [1.0, 0.0]).items())
    mean = load_file(steep.average(run, last=3, out=tmp_path / "mean", score=False).path / WEIGHTS)
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in merged) / 3, rtol=1e-5, atol=1e-7)
    del weights
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow  # the same weights as above through a command that is tested on whole models
def test_blend_takes_an_adapter_run(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapter_run
    blend = steep.blend(run, alphas=[0, 1], out=tmp_path / "blend", tokens=1000)
    assert [point.alpha for point in blend.points] == [0, 1]
    assert load_file(blend.path / WEIGHTS).keys() == load_file(base / WEIGHTS).keys()


def test_the_moving_average_of_an_adapter_is_merged(adapter_run: tuple[Path, Path], tmp_path: Path) -> None:
    base, run = adapter_run
    averaged = load_file(steep.average(run, weights="ema", out=tmp_path / "ema", score=False).path / WEIGHTS)
    saved = open_checkpoint(newest(run).parent.parent).optimizer_tensors()
    start = load_file(base / WEIGHTS)
    name = "model.layers.0.mlp.up_proj"
    a, b = (saved[f"{name}.lora_{side}.default.weight.ema"] for side in "AB")
    scale = json.loads((newest(run) / "adapter_config.json").read_text())
    expected = start[f"{name}.weight"] + scale["lora_alpha"] / scale["r"] * (b @ a)
    torch.testing.assert_close(averaged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-6)
    embedding = averaged["model.embed_tokens.weight"]
    trained = "model.embed_tokens.modules_to_save.default.weight.ema"
    if trained in saved:
        assert torch.equal(embedding, saved[trained])
    else:
        assert torch.equal(embedding, start["model.embed_tokens.weight"])


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints/LATEST").read_text().strip() / "model/consolidated"


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_blend_command_writes_a_model_that_every_command_takes(runs: list[Path], corpus_directory: Path) -> None:
    run = runs[1]
    done = command("blend", str(run), "--alphas", "0,0.5,1", "--tokens", "1000")
    assert done.returncode == 0, done.stderr
    assert "forgetting is not capped" in done.stdout
    out = run / "blend/best"
    assert (out / "blend.svg").is_file()
    assert [path.name for path in (run / "blend").iterdir()] == ["best"]
    assert steep.evaluate(out).scores[0].bits_per_byte


def test_a_blend_does_not_score_what_the_run_has_scored(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[1], run)
    said: list[str] = []
    again = [steep.blend(run, alphas=[0, 0.5, 1], out=tmp_path / name, tokens=tokens, say=said.append)
             for name, tokens in (("known", None), ("anew", 1000))]  # fmt: skip
    assert said.count("alpha 0 and 1: scores taken from the run") == 1
    recorded = json.loads((run / "summary.json").read_text())["texts"]
    ends = [{text: score[side]["bits_per_byte"] for text, score in recorded.items()} for side in ("before", "after")]
    assert [point.bits_per_byte for point in again[0].points[::2]] == ends
    scored = steep.evaluate(run, precision="fp32")
    assert {s.text: s.bits_per_byte for s in scored.scores} == pytest.approx(ends[1], rel=1e-6)  # the same number
    known = known_scores(run, config_of_run(run), str(run), None)
    assert known.are_of(scored.scores)
    assert not known.are_of(
        steep.evaluate(run, tokens=500, precision="fp32").scores
    )  # other texts: they are scored again


@pytest.mark.parametrize(("alpha", "end"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_a_blend_are_the_models_bit_for_bit(
    runs: list[Path], tmp_path: Path, alpha: float, end: int
) -> None:
    base, run = runs
    # Which alpha the command writes is decided by the scores, so the ends are written by hand.
    from steep.merge.weights import combine, open_weights, write_model

    weights = [open_weights(str(base), print), open_weights(str(run), print)]
    out = write_model(combine(weights, [1 - alpha, alpha]), newest(run), tmp_path / "out", "")
    assert same(out, [base, newest(run)][end])


def test_average_command_is_the_mean_of_the_checkpoints(runs: list[Path], tmp_path: Path) -> None:
    run = runs[1]
    done = command("average", str(run), "--last", "3", "--out", str(run / "mean"))
    assert done.returncode == 0, done.stderr
    assert "step_6" in done.stdout
    assert "bits/byte" in done.stdout
    folders = sorted((run / "checkpoints").glob("epoch*"))
    assert len(folders) == 3
    parts = [load_file(folder / "model/consolidated" / WEIGHTS) for folder in folders]
    for name, mean in load_file(run / "mean" / WEIGHTS).items():
        torch.testing.assert_close(mean, torch.stack([part[name] for part in parts]).mean(0), rtol=1e-6, atol=1e-8)
    with pytest.raises(ConfigError, match="keeps 3 complete checkpoints"):
        steep.average(run, last=5)


def test_a_damaged_checkpoint_is_not_averaged(runs: list[Path], tmp_path: Path) -> None:
    folders = sorted((runs[1] / "checkpoints").glob("epoch*"))[:2]
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    path = copies[0] / "model/consolidated" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(steep.core.errors.CheckpointError, match="cannot be used"):  # type: ignore[attr-defined]
        steep.average(copies, out=tmp_path / "out", score=False)
    assert not (tmp_path / "out").exists()


def test_restore_instruct_adds_the_difference_and_carries_the_chat_template(runs: list[Path], tmp_path: Path) -> None:
    base, run = runs
    instruct = Path(shutil.copytree(base, tmp_path / "instruct"))
    save_file({n: t + 0.25 for n, t in load_file(base / WEIGHTS).items()}, instruct / WEIGHTS, {"format": "pt"})
    (instruct / "chat_template.jinja").write_text("{{ messages[0].content }}")
    done = command(
        "restore-instruct", str(run), "--base", str(base), "--instruct", str(instruct), "--scale", "0.5",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    trained = load_file(newest(run) / WEIGHTS)
    for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items():
        torch.testing.assert_close(tensor, trained[name] + 0.125, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out/chat_template.jinja").is_file()


def test_restore_instruct_refuses_another_vocabulary(runs: list[Path], tmp_path: Path) -> None:
    base, run = runs
    other = Path(shutil.copytree(base, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="in the instruct model"):
        steep.restore_instruct(run, base=base, instruct=other, out=tmp_path / "out")


def test_the_best_domain_score_under_the_cap_is_chosen() -> None:
    numbers = [(0.0, 2.0, 1.0), (0.5, 1.5, 1.01), (1.0, 1.2, 1.05)]
    points = [BlendPoint(alpha, {"domain": domain, "general": general}) for alpha, domain, general in numbers]
    assert choose(points, 0.02)[0].alpha == 0.5
    assert choose(points, 0.10)[0].alpha == 1.0
    assert choose(points, 0.0)[0].alpha == 0.0
    with pytest.raises(ConfigError, match="domain text"):
        choose([BlendPoint(0.0, {"general": 1.0})], 0.02)


def test_roles_decide_which_texts_are_capped_and_the_worst_of_them_counts() -> None:
    points = [
        BlendPoint(0.0, {"plays": 2.0, "manuals": 1.0, "general": 1.0}),
        BlendPoint(0.5, {"plays": 1.5, "manuals": 1.01, "general": 0.9}),
        BlendPoint(1.0, {"plays": 1.2, "manuals": 1.05, "general": 0.8}),
    ]
    best, reason = choose(points, 0.02, {"manuals": "general"})
    assert best.alpha == 0.5
    assert "manuals, general at most 2.0% worse" in reason
    assert choose(points, 0.02)[0].alpha == 1.0  # without roles manuals is domain text, and general became better
    assert "not capped" in choose(points, 0.02, {"general": "domain"})[1]


def test_shares() -> None:
    assert shares_of("uniform", 4) == [0.25] * 4
    assert shares_of("ema:0.5", 3) == [0.25, 0.25, 0.5]
    with pytest.raises(ConfigError, match=r"ema:0\.9"):
        shares_of("ema:2", 3)
