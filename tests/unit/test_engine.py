"""The engine: its state by pieces and whole, put back bit for bit, and begun again for a trial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steep.batch import StepBatches
from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import open_checkpoint
from steep.checkpoint.pieces import capture_rng
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import TrainingError
from steep.loader import make_batch
from steep.models.attention_choice import prepare_lm_loss
from steep.models.fresh import build_fresh
from steep.models.runner import ModelRunner
from steep.optim.build import build_optimizer
from steep.optim.config import OptimizerConfig
from steep.order.batches import Sizes, count_step
from steep.order.data_order import OrderedSequence
from steep.order.packing import TokenRange
from steep.training.engine import TorchEngine
from steep.training.rehearsal import sizes_that_fit
from support import LLAMA

LENGTH = 16
TIED = {**LLAMA, "tie_word_embeddings": True}


class Documents:
    document_lengths = (40,)

    def read(self, document: int, start: int, count: int, out: object) -> None:
        out[:] = range(start + 1, start + count + 1)  # type: ignore[index]


def make_engine(model: dict[str, object] = LLAMA, seed: int = 0, precision: str = "fp32") -> TorchEngine:
    lm_loss = prepare_lm_loss(build_fresh(model, None, seed), print, vocab_size=512)
    optimizer = build_optimizer(lm_loss.model, OptimizerConfig(learning_rate=1e-2))
    return TorchEngine(
        ModelRunner(lm_loss, torch.device("cpu"), precision), optimizer, max_grad_norm=1.0, ema_decay=0.9
    )


def step(start: int) -> StepBatches:
    sequences = [OrderedSequence(0, [TokenRange(0, start, LENGTH)])]
    counts = count_step(sequences, LENGTH, [Documents.document_lengths])
    return StepBatches([make_batch(sequences, [Documents()], LENGTH)], counts)


def losses(engine: TorchEngine, starts: list[int]) -> list[float]:
    return [engine.train_step(step(start), 1.0).numbers().loss for start in starts]


@pytest.mark.parametrize(("fitting", "size"), [(8, 8), (3, 2), (0, 1)])
@pytest.mark.parametrize("precision", ["fp32", "mixed_fp16"])
def test_a_micro_batch_that_runs_out_of_memory_is_replaced_before_step_0(
    fitting: int, size: int, precision: str
) -> None:
    """A forward pass that raises for more tokens stands for the GPU; what follows is bit for bit a run without the trial."""
    engine, untouched, lines = make_engine(precision=precision), make_engine(precision=precision), []

    def allocate(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].numel() > fitting * LENGTH:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = engine._runner.model.get_input_embeddings().register_forward_pre_hook(allocate)
    found = sizes_that_fit(engine, Sizes(LENGTH, 8, 8, 80), 512, 10**6, lines.append)
    hook.remove()
    assert (found.micro_batch_size, found.grad_accum_steps) == (size, 8 // size)
    said = (
        [] if size == 8 else [f"micro_batch_size auto: {size}, since 8 ran out of memory in a trial without an update"]
    )
    assert lines == said
    assert all(parameter.grad is None for parameter in engine._runner.model.parameters())
    assert losses(engine, [0, 3]) == losses(untouched, [0, 3])


@pytest.mark.parametrize("model", [LLAMA, TIED])
def test_the_whole_tensors_are_the_pieces_and_the_state_dict(model: dict[str, object]) -> None:
    engine = make_engine(model)
    losses(engine, [0])
    whole = dict(engine.whole())
    pieces = engine.pieces().model
    assert [piece.name for piece in pieces] == list(whole)
    assert all(piece.offset == (0,) * piece.tensor.dim() for piece in pieces)
    assert all(piece.global_shape == tuple(whole[piece.name].shape) for piece in pieces)
    assert all(torch.equal(piece.tensor, whole[piece.name]) for piece in pieces)
    assert ("lm_head.weight" in whole) is (model is LLAMA)  # a tied tensor comes once


def test_an_engine_that_loads_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    engine = make_engine()
    losses(engine, [0, 3])
    pieces = engine.pieces()
    with CheckpointWriter(tmp_path) as writer:
        writer.save("epoch_0_step_2", CheckpointState(
            model=pieces.model, optimizer=pieces.optimizer, optimizer_state=pieces.optimizer_state, rng=capture_rng(),
            config_yaml="", step=2, tokens=0, sequences_seen=2, plan_fingerprint="",
        ))  # fmt: skip
    straight = losses(engine, [5, 7])
    other = make_engine(seed=1)
    losses(other, [9])
    other.load(open_checkpoint(tmp_path / "epoch_0_step_2"))
    assert losses(other, [5, 7]) == straight
    assert all(torch.equal(one, dict(engine.whole())[name]) for name, one in other.whole())


def test_a_restart_gives_the_first_trial_again() -> None:
    engine = make_engine()
    beginning = engine.trained_weights()
    config = OptimizerConfig(learning_rate=3e-3)
    engine.restart(beginning, config)
    first = losses(engine, [0, 5])
    engine.restart(beginning, config)
    assert losses(engine, [0, 5]) == first
    assert engine.peak_rates["decay"] == 3e-3


def test_a_step_that_may_not_update_leaves_the_weights() -> None:
    engine = make_engine()
    before = {name: tensor.clone() for name, tensor in engine.whole()}
    asked: list[tuple[float, float]] = []
    result = engine.train_step(step(0), 1.0, lambda loss, norm: bool(asked.append((loss, norm))))
    numbers = result.numbers()
    assert not result.applied
    assert asked == [(numbers.loss, numbers.grad_norm)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.whole())


def test_fp16_is_scaled_as_gradscaler_does() -> None:
    engine, plain = make_engine(precision="mixed_fp16"), make_engine(precision="mixed_fp16")
    scaler, parameters = torch.amp.GradScaler("cpu"), list(plain._runner.model.parameters())
    for start in (0, 3, 5):
        result = engine.train_step(step(start), 1.0)
        batches = step(start)
        with torch.autocast("cpu", torch.float16):
            total = plain._runner.lm_loss(batches.batches[0]).total
        scaler.scale(total / batches.counts.num_label_tokens).backward()
        scaler.unscale_(plain.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(plain.optimizer)
        scaler.update()
        plain.optimizer.zero_grad()
        assert (result.applied, result.overflowed, result.loss_scale) == (True, False, 65536.0)
        assert result.numbers().grad_norm == float(norm)
    assert all(torch.equal(whole, dict(plain.whole())[name]) for name, whole in engine.whole())
    exact = make_engine()
    assert losses(exact, [0, 3, 5])[-1] == pytest.approx(result.numbers().loss, rel=2e-3)


def test_an_overflow_makes_no_update_and_halves_the_scale() -> None:
    engine = make_engine(precision="mixed_fp16")
    assert engine._scale is not None
    engine._scale.load({**engine._scale.state(), "scale": 2.0**40})
    before = {name: tensor.clone() for name, tensor in engine.whole()}
    asked: list[float] = []
    result = engine.train_step(step(0), 1.0, lambda loss, norm: bool(asked.append(loss)) or True)
    assert (result.applied, result.overflowed, result.loss_scale) == (False, True, 2.0**40)
    assert not asked  # an overflow is not a spike
    assert torch.isfinite(torch.tensor(result.numbers().loss))
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.whole())
    assert engine._scale.value == 2.0**39
    refused = engine._scale
    refused.load({**refused.state(), "scale": 2.0**10})
    result = engine.train_step(step(0), 1.0, lambda loss, norm: False)
    assert (result.applied, result.overflowed, refused.value) == (False, False, 2.0**10)


def test_numbers_that_do_not_fit_fp16_at_any_scale_end_the_run() -> None:
    engine = make_engine(precision="mixed_fp16")
    with torch.no_grad():
        engine._runner.model.get_parameter("model.layers.0.mlp.down_proj.weight").fill_(1e30)
    for _ in range(16):
        assert not engine.train_step(step(0), 1.0).applied
    with pytest.raises(TrainingError, match="even at a loss scale of 1 .*mixed_bf16"):
        engine.train_step(step(0), 1.0)
