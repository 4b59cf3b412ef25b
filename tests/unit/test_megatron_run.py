"""A run in Megatron's order, from its configuration: the samples of the order are the batches that are trained on."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from steep.config.load import load_run_config
from steep.core.errors import CheckpointError, ConfigError
from steep.core.say import say_nothing
from steep.data.open import open_run_data
from steep.loader import Loader
from steep.order.batches import run_sizes
from steep.order.megatron import build_megatron_orders
from steep.sources.config import SourceConfig
from steep.store.prepare import prepare_sources
from steep.store.reader import open_store
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.hf_tokenizer import load_hf_tokenizer
from steep.tokenizer.open import load_tokenizer, text_tokenizer
from steep.training.loop import train
from support import run_mapping


@pytest.fixture(scope="module")
def prefixes(
    tmp_path_factory: pytest.TempPathFactory, documents: list[str], tiny_tokenizer_directory: Path
) -> list[str]:
    """Two Megatron datasets without a manifest, as another tool leaves them."""
    folder = tmp_path_factory.mktemp("megatron")
    tokenizer = text_tokenizer(load_hf_tokenizer(str(tiny_tokenizer_directory)), TokenizerConfig())
    found = []
    for name, texts in (("a", documents[:40]), ("b", documents[40:60])):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_sources([SourceConfig(path=str(source))], tokenizer, folder / name)
        [shard] = (folder / name).glob("shard_*.bin")
        for suffix in (".bin", ".idx"):
            shard.with_suffix(suffix).rename(folder / f"{name}_text_document{suffix}")
        found.append(str(folder / f"{name}_text_document"))
    return found


@pytest.fixture
def mapping(tmp_path: Path, prefixes: list[str], tiny_tokenizer_directory: Path) -> dict[str, Any]:
    data = {
        "order": "megatron",
        "split": "0.9, 0.1, 0.0",
        "train": [{"path": prefixes[0], "weight": 0.7}, {"path": prefixes[1], "weight": 0.3}],
        "num_val_samples": 6,
        "index_cache_directory": str(tmp_path / "index"),
        "document_mask": False,
        "validation": {},
    }
    return run_mapping(tmp_path, tmp_path, tiny_tokenizer_directory, data=data)


def test_the_batches_are_megatrons_samples(mapping: dict[str, Any], prefixes: list[str]) -> None:
    config = load_run_config(mapping=mapping)
    data = open_run_data(config, load_tokenizer(config.tokenizer, config.model), say_nothing)
    sizes = run_sizes(config.train, 64, data.order.sequences_per_epoch)
    expected = build_megatron_orders(
        [0.7, prefixes[0], 0.3, prefixes[1]],
        "0.9, 0.1, 0.0",
        64,
        7,
        24,
        6,
        lambda path: open_store(path, unit="sequences"),
    )
    seen = [
        (batch.input_ids[row].tolist(), batch.labels[row].tolist())
        for step in Loader(data.order, data.stores, sizes, document_mask=False)
        for batch in step.batches
        for row in range(len(batch.input_ids))
    ]
    assert len(seen) == 24
    for index, (ids, labels) in enumerate(seen):
        sequence = expected.train.sequence(index)
        stream = [
            token
            for part in [*sequence.ranges, *([sequence.following] if sequence.following else [])]
            for token in expected.stores[sequence.source]
            .document(part.document)[part.start : part.start + part.count]
            .tolist()
        ]
        last = sequence.ranges[-1]
        if sequence.following is None:
            stream.append(int(expected.stores[sequence.source].document(last.document)[last.start + last.count]))
        assert (ids, labels) == (stream[:64], stream[1:])


def test_a_run_trains_scores_its_validation_split_and_resumes(mapping: dict[str, Any], tmp_path: Path) -> None:
    mapping["train"]["steps"] = 4
    result = train(load_run_config(mapping=mapping), stream=io.StringIO())
    assert set(result.after) == {"validation"}
    assert result.after["validation"]["tokens"] <= 6 * 64
    assert list((tmp_path / "index").glob("*-GPTDataset-train-document_index.npy"))
    with pytest.raises(CheckpointError, match="depends on the length of the run"):
        train(load_run_config(mapping=mapping, overrides=["--train.steps", "4000"]), stream=io.StringIO())


def test_keys_of_the_other_order_are_refused(mapping: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="order megatron has no align_to_bos"):
        load_run_config(mapping=mapping, overrides=["--data.align_to_bos", "true"])
    with pytest.raises(ConfigError, match="belong to order megatron"):
        load_run_config(mapping=mapping, overrides=["--data.order", "native"])


def test_what_the_order_never_takes_is_in_the_ledger(mapping: dict[str, Any]) -> None:
    mapping["train"]["steps"] = 2
    result = train(load_run_config(mapping=mapping), stream=io.StringIO())
    sources = json.loads((result.run_directory / "ledger.json").read_text())["sources"]
    for source in sources:
        [(reason, left)] = source["dropped_tokens"].items()
        assert reason == "fills no sample"
        assert 0 < left < 64
    mapping["run"]["name"] = "aligned"
    mapping["data"] = {**mapping["data"], "order": "native", "align_to_bos": True, "document_mask": True}
    for key in ("split", "num_val_samples", "index_cache_directory"):
        del mapping["data"][key]
    result = train(load_run_config(mapping=mapping), stream=io.StringIO())
    sources = json.loads((result.run_directory / "ledger.json").read_text())["sources"]
    assert all(source["dropped_tokens"]["align_to_bos"] > 0 for source in sources)
