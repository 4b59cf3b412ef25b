"""`steep export`: a trained model in the format that another program serves, verified by loading it there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steep.core.errors import ConfigError, DataError, ModelError, SteepError
from steep.core.files import atomic_folder
from steep.core.public import public
from steep.core.say import Say, say_nothing, tell
from steep.core.units import format_bytes
from steep.data.held_out_text import HeldOutText
from steep.data.open import open_run_data
from steep.evaluation.held_out import tokens_of
from steep.evaluation.loaded_model import LoadedModel, open_model
from steep.evaluation.model_reference import Reference, config_of_run, model_reference
from steep.exporters.format import ExportFormat, ExportTask, Options, dtype_name, load_format
from steep.exporters.model_card import model_card
from steep.exporters.parity import GREEDY_TOKENS, Parity, Questions, answer
from steep.models.generation_settings import mend_generation_settings
from steep.models.layers import max_positions

VERIFICATION_TEXT = """\
In the beginning of every verification there is a text that both programs read. It has words, numbers such as 3.14159 and 2,048, \
code like `for i in range(10): print(i)`, a little français, and a question: is it the same model?

A model that was written down wrongly seldom falls silent. It goes on speaking, a little worse than before, and whoever serves it
learns of that weeks later. So the two are made to read the same page: at every place of it each says how likely it holds every
token that could come next, and the two lists are laid side by side. Where rows of a matrix were exchanged, where a one was
added to the weights of a norm or was not, where positions are counted otherwise, the lists part early, and they do so on
any page whatever, on this one too.

    def same(one, other, tolerance=1e-4):
        return max(abs(a - b) for a, b in zip(one, other)) <= tolerance

Then each continues a sentence, thirty-two tokens long, always by the likeliest one. On 14 March 1879, at 11:30, nobody had \
asked for such a thing yet; today it costs about a minute.
"""
MOST_TOKENS = 384
"""Most tokens of each verification text. Both programs' logits are held in memory: tokens x vocabulary x 4 bytes each."""
PROMPT_TOKENS = 12


@dataclass(frozen=True)
class ExportResult:
    """A model in the format that another program serves, and how it was verified."""

    path: Path
    dtype: str
    size_bytes: int
    parities: list[Parity]
    """One per program that read it in a process of its own; the last is the one that will serve it, where that was available."""

    @property
    def verified_with(self) -> str:
        """Program and version that loaded it in a process of its own."""
        return self.parities[-1].program

    @property
    def largest_logit_difference(self) -> float:
        """Between the trained model in this dtype and the exported one, over the verification texts."""
        return self.parities[-1].largest_logit_difference

    @property
    def loss_change(self) -> float:
        """Nats per token of the exported model minus those of the trained model in fp32, over the verification texts."""
        return self.parities[-1].loss_change

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.dtype}, {format_bytes(self.size_bytes)}. Verified:"]
        return "\n".join([*lines, *(f"  {parity}" for parity in self.parities)])


@public
def export(
    run: Reference,
    *,
    to: str = "hf",
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    max_shard_size: int | str = "5GB",
    tokenizer_pre: str | None = None,
    verify_with: str | None = None,
    overwrite: bool = False,
    allow_code: bool | None = None,
    say: Say = tell,
) -> ExportResult:
    """Write a trained model in the format that another program serves, and verify it with that program.

    run: a run, checkpoint or model. to: `hf`, a folder for transformers and vLLM; `gguf`, a file for llama.cpp; `ollama`, that
    and a Modelfile; `adapter`, in peft's layout. out: a folder, default `<run>/export/<to>`. dtype: float32, bfloat16 (default)
    or float16, and q8_0 for gguf and ollama. quantize: nf4, int8 or torchao_int8, for hf. max_shard_size: of a weight file.
    tokenizer_pre: llama.cpp's name of the rule that splits text, where it is not found. verify_with: a Python interpreter that
    has llama-cpp-python. overwrite: replace an existing export. allow_code: as for `steep.evaluate`. say: called with each
    remark. Raises ModelError, with the numbers, if the exported model is not the trained one.
    """
    options = Options(dtype, quantize, max_shard_size, tokenizer_pre, verify_with)
    with open_task(os.fspath(run), to, options, allow_code=allow_code, say=say) as (exporter, task):
        folder = Path(out) if out is not None else _default_folder(task.loaded, to, quantize)
        check_replaceable(folder, overwrite, exporter.ENDINGS)
        ask_trained(task)
        with atomic_folder(folder) as temporary:
            expected = exporter.write(task, temporary)
            parities = exporter.verify(task, temporary, expected)
    return ExportResult(
        path=folder,
        dtype=quantize or task.dtype,
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        parities=parities,
    )


@contextmanager
def open_task(
    reference: str, to: str, options: Options, *, allow_code: bool | None = None, say: Say = tell
) -> Iterator[tuple[ExportFormat, ExportTask]]:
    """The format and what it has to do, checked as far as possible before any work. Raises ConfigError, ModelError."""
    exporter = load_format(to)
    dtype = dtype_name(options.dtype, exporter, to)
    source = model_reference(reference)
    with open_model(source, device="cpu", precision="fp32", allow_code=allow_code, say=say) as loaded:
        if not hasattr(loaded.model, "save_pretrained") or not hasattr(loaded.model, "generation_config"):
            raise ModelError(
                f"{reference}: {type(loaded.model).__name__} is not a transformers model, so it has no {to} format"
            )
        if getattr(loaded.model.config, "quantization_config", None) is not None:
            raise ModelError(f"{reference} is quantized already; export the model that it was made from")
        mend_generation_settings(loaded.model, say)
        card = model_card(reference, loaded.run, options.quantize or dtype)
        name = (loaded.run or Path(loaded.reference)).resolve().name.removesuffix(".gguf") or "model"
        task = ExportTask(loaded, options, dtype, name, card, say)
        exporter.check_task(task)
        yield exporter, task


def ask_trained(task: ExportTask) -> None:
    """Ask the model in fp32, before anything is rounded: its verification texts, and a sentence to continue."""
    loaded = task.loaded
    room = max_positions(loaded.model) or 2048
    most = min(MOST_TOKENS, room)
    start = [loaded.tokenizer.bos_id] if loaded.tokenizer.prepend_bos and loaded.tokenizer.bos_id is not None else []
    ids = start + loaded.tokenizer.encode(VERIFICATION_TEXT)
    texts = {"verification text": ids[:most], **_held_out_ids(loaded, most, task.say)}
    prompt = ids[: min(PROMPT_TOKENS, room // 2)]
    task.questions = Questions(texts, prompt, min(GREEDY_TOKENS, room - len(prompt)))
    task.trained = answer(task.model, task.questions, "trained")


def check_replaceable(folder: Path, overwrite: bool, endings: Set[str]) -> None:
    """Raises ConfigError unless `folder` does not exist, or is an earlier export that may be replaced."""
    if folder.suffix == ".gguf":
        raise ConfigError(f"--out {folder}: give a folder; the .gguf file is written in it")
    if not folder.exists():
        return
    if not overwrite:
        raise ConfigError(f"{folder} already exists; choose another --out, or give --overwrite")
    holds_model = (folder / "config.json").is_file() or any(folder.glob("*.gguf"))
    if not folder.is_dir() or (any(folder.iterdir()) and not holds_model):
        raise ConfigError(f"{folder} is not an exported model, so it is not overwritten; choose another --out")
    if others := [path.name for path in folder.iterdir() if path.is_dir() or not {path.suffix, path.name} & endings]:
        raise ConfigError(
            f"{folder} has more than an export in it ({others[0]}), so it is not overwritten; choose another --out"
        )


def _default_folder(loaded: LoadedModel, to: str, quantize: str | None) -> Path:
    if loaded.run is None:
        raise ConfigError(f"{loaded.reference} is not in a run directory; name the folder for the export with --out")
    return loaded.run / "export" / (to if quantize is None else f"{to}-{quantize}")


def _held_out_ids(loaded: LoadedModel, most_tokens: int, say: Say) -> dict[str, list[int]]:
    """Per held-out text of the model's run the beginning of its first document of at least two tokens.

    Empty for a model outside a run. Where the run's stores are gone, nothing is prepared again; `say` is told.
    """
    if loaded.run is None:
        return {}
    try:
        data = open_run_data(config_of_run(loaded.run), loaded.tokenizer, say_nothing, progress=_refuse_to_prepare)
    except SteepError as error:
        say(f"the run's held-out texts are not compared: {error}")
        return {}
    found = {text.name: _beginning(text, most_tokens) for text in data.held_out_texts}
    return {name: ids for name, ids in found.items() if ids}


def _refuse_to_prepare(done_bytes: int, total_bytes: int, tokens: int) -> None:
    raise DataError("they would have to be prepared again")


def _beginning(text: HeldOutText, most_tokens: int) -> list[int]:
    documents = ((store, document) for store, numbers in text.parts for document in numbers.tolist())
    beginnings = (tokens_of(store, document, most_tokens) for store, document in documents)
    return next((ids for ids in beginnings if len(ids) >= 2), [])
