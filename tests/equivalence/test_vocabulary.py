"""New tokens in a model: old logits stay, new rows are the mean of their parts, and what is saved comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import steep
from steep.core.errors import ConfigError
from steep.models.fresh import build_fresh
from steep.models.vocabulary import extend_embeddings
from steep.tokenizer.config import VocabularyConfig
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.vocabulary import extend_tokenizer
from support import LLAMA, run_mapping

WORDS = ["statement", " expression", "identifier"]


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_directory: Path) -> Path:
    build_fresh({**LLAMA, "tie_word_embeddings": request.param}, None, seed=1).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_tokenizer_directory).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("base", [True, False], ids=["tied", "untied"], indirect=True)
def test_old_logits_stay_and_new_rows_are_means(base: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    extension = extend_tokenizer(load_hf_tokenizer(str(base)), VocabularyConfig(add=WORDS))
    assert extension is not None
    ids = torch.arange(24)[None]
    before = model(input_ids=ids).logits.detach()
    rows = model.get_input_embeddings().weight.shape[0]
    extend_embeddings(model, extension.subtokens, extension.rows, "mean_of_subtokens", print)
    after = model(input_ids=ids).logits.detach()
    assert after.shape[-1] == extension.rows == rows + 3
    assert torch.equal(after[..., :rows], before)
    for ends in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        for number, parts in extension.subtokens.items():
            torch.testing.assert_close(ends[number], ends[parts].mean(dim=0))
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_rows_that_no_token_has_are_used_first() -> None:
    model: Any = build_fresh({**LLAMA, "vocab_size": 520}, None, seed=1)
    lines: list[str] = []
    extend_embeddings(model, {512: [1, 2], 513: [3]}, 514, "mean_of_subtokens", lines.append)
    assert model.get_input_embeddings().weight.shape[0] == 520
    assert "in unused rows of the 520" in lines[0]
    extend_embeddings(model, {512: [1], 513: [3]}, 514, "mean", print)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[512], weight[:512].mean(dim=0))


@pytest.mark.parametrize("adapter", [None, {"rank": 4}], ids=["full", "adapter"])
def test_a_run_with_new_tokens_from_plan_to_export(
    base: Path, adapter: Any, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, capfd: Any
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "vocabulary": {"add": WORDS}, "adapter": adapter}
    plan = steep.plan(mapping)
    plain = steep.plan({key: value for key, value in mapping.items() if key != "vocabulary"})
    assert plan.structure.vocab_size == plain.structure.vocab_size + 3
    assert plan.data.order.fingerprint != plain.data.order.fingerprint  # other tokens, other order
    run = steep.train(mapping).run_directory
    said = capfd.readouterr().out
    assert "vocabulary: 3 new tokens" in said
    assert ("trained in full beside the adapter" in said) is (adapter is not None)

    folder = steep.export(run, dtype="float32", out=tmp_path / "hf").path
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("A statement is an expression.", return_tensors="pt")["input_ids"]
    known = {tokenizer.convert_tokens_to_ids(word) for word in WORDS}
    assert len(known & set(ids[0].tolist())) == 2
    assert tokenizer.decode(ids[0]) == "A statement is an expression."
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == plan.structure.vocab_size
    against = steep.evaluate(run, against="base")  # the base is scored with its own tokenizer
    assert against.against_scores is not None
    summary = json.loads((run / "summary.json").read_text())["texts"]["heldout"]
    # a run scores in batches of another size, which changes the last bits of bf16
    assert summary["before"]["bits_per_byte"] == pytest.approx(against.against_scores[0].bits_per_byte, rel=1e-5)
    assert summary["after"]["bits_per_byte"] == pytest.approx(against.scores[0].bits_per_byte, rel=1e-4)
    first = next(line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == "evaluate")
    assert first["bits_per_byte"] != summary["before"]["bits_per_byte"]  # of the untrained new tokens


@pytest.mark.parametrize("adapter", [pytest.param(None, marks=pytest.mark.slow), {"rank": 4}], ids=["full", "adapter"])
def test_a_resumed_run_with_new_tokens_goes_on_bit_for_bit(
    base: Path, adapter: Any, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "vocabulary": {"add": WORDS}, "adapter": adapter}
    mapping["schedule"] = {"name": "constant", "warmup_steps": 0}  # the same for a run that is made longer
    whole = losses(steep.train(mapping).run_directory)
    mapping["run"] = {**mapping["run"], "name": "halves"}
    mapping["train"] = {**mapping["train"], "steps": 3}
    steep.train(mapping)
    mapping["train"]["steps"] = 6
    assert losses(steep.train(mapping).run_directory) == whole


def losses(run: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def test_the_base_is_scored_on_a_store_that_only_the_new_tokenizer_reads(
    base: Path, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    steep.tokenizer_extend(str(corpus_directory), tokenizer=str(base), tokens=20, out=tmp_path / "more")
    steep.prepare(str(corpus_directory), tokenizer=str(tmp_path / "more"), out=tmp_path / "store")
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "vocabulary": {"add": str(tmp_path / "more")}}
    mapping["data"] = {**mapping["data"], "train": [{"path": str(tmp_path / "store")}]}
    result = steep.train(mapping)
    before, after = result.before["heldout"], result.after["heldout"]
    assert before["text_bytes"] == after["text_bytes"]  # the same text
    assert before["tokens"] > after["tokens"]  # in the base's tokens, of which it needs more


def test_a_folder_of_continued_merges_trains_and_exports(
    base: Path, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    steep.tokenizer_extend(str(corpus_directory), tokenizer=str(base), tokens=40, out=tmp_path / "more")
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "vocabulary": {"add": str(tmp_path / "more")}}
    run = steep.train(mapping).run_directory
    folder = steep.export(run, dtype="float32", out=tmp_path / "hf").path  # compares the ids of hard strings
    assert len(AutoTokenizer.from_pretrained(folder)) == len(load_hf_tokenizer(str(base))) + 40


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"config": LLAMA}}, "adds tokens to pretrained weights"),
        ({"freeze": "embeddings"}, "must be trained"),
        ({"freeze": ["*embed_tokens*"]}, "must be trained"),
        ({"freeze": ["lm_head*", "*embed_tokens*"]}, "must be trained"),
        ({"tokenizer": {"pretrained": "gpt2"}}, "the model's own tokenizer"),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, changes: Any, problem: str, tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path
) -> None:
    mapping = run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model={"pretrained": str(base)})
    mapping |= {"tokenizer": {}, "vocabulary": {"add": WORDS}}
    if "freeze" in changes:
        mapping["model"] |= changes
    else:
        mapping |= changes
    with pytest.raises(ConfigError, match=problem):
        steep.plan(mapping)
