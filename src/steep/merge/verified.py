"""A merged model written as a folder, which is reloaded in a new process: its logits must be those of the tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from steep import __version__
from steep.core.errors import ModelError
from steep.exporters.formats.hf import DTYPES
from steep.exporters.parity import Questions, answer, check, compare
from steep.exporters.verify import ask_transformers
from steep.merge.weights import write_model
from steep.models.config import ModelConfig
from steep.models.layers import is_tied, max_positions, vocab_size
from steep.models.load import cast_weights, load_model


def write_verified(
    tensors: Mapping[str, Tensor],
    files_from: Path,
    out: Path,
    made: Sequence[str],
    *,
    config_from: Path | None = None,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model folder with a card, verified before it appears at `out`. Raises ModelError where the logits differ.

    made: what the model is made of, for the card, a line each. The others are as for `write_model`; `finish` is called after the
    verification.
    """

    def verify_and_finish(folder: Path) -> None:
        _verify(folder, tensors, config_from or files_from)
        finish(folder)

    # the metadata block is what model hubs read
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [steep, merge]", "---", ""]
    head += [f"# {out.name}", "", f"Made with steep {__version__}, combined in fp32:", ""]
    card = "\n".join([*head, *(f"- {line}" for line in made), ""])
    write_model(tensors, files_from, out, card, config_from=config_from, finish=verify_and_finish)


def _verify(folder: Path, tensors: Mapping[str, Tensor], architecture: Path) -> None:
    """architecture: a folder whose model takes these tensors."""
    model = load_model(ModelConfig(pretrained=str(architecture)))
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"weights in {name} cannot be verified; use a model in one of {', '.join(DTYPES)}")
    cast_weights(model, dtype)
    missing, unexpected = model.load_state_dict(dict(tensors), strict=False)
    missing = [key for key in missing if not (is_tied(model) and key.endswith(("lm_head.weight", "wte.weight")))]
    if missing or unexpected:
        raise ModelError(f"{architecture} has another architecture: {[*missing, *unexpected][0]} does not fit")
    model.eval()
    vocabulary = vocab_size(model) or 1
    input_ids = [7 * i % vocabulary for i in range(min(64, max_positions(model) or 64))]
    questions = Questions({"some ids": input_ids}, input_ids[:1], 1)
    expected = answer(model, questions, "combined")
    found = ask_transformers("hf", folder, questions)
    check(compare(expected, expected, found, questions.texts), expected, DTYPES[name], found.greedy, f"{folder}")
