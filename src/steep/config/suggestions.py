"""The key that was probably meant: the words that other tools use, then the nearest keys of this configuration."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Optional

from steep.config.keys import Location, all_keys, dotted, section_of, type_at

SYNONYMS: dict[str, tuple[str, str]] = {
    "lr": ("optimizer.learning_rate", ""),
    "max_lr": ("optimizer.learning_rate", ""),
    "peak_lr": ("optimizer.learning_rate", ""),
    "min_lr": ("schedule.final_ratio", "a share of the peak, not a rate"),
    "min_learning_rate": ("schedule.final_ratio", "a share of the peak, not a rate"),
    "min_lr_ratio": ("schedule.final_ratio", ""),
    "wd": ("optimizer.weight_decay", ""),
    "beta1": ("optimizer.betas", "a list of two numbers"),
    "beta2": ("optimizer.betas", "a list of two numbers"),
    "adam_beta1": ("optimizer.betas", "a list of two numbers"),
    "adam_beta2": ("optimizer.betas", "a list of two numbers"),
    "adam_epsilon": ("optimizer.eps", ""),
    "epsilon": ("optimizer.eps", ""),
    "optim": ("optimizer.name", ""),
    "scheduler": ("schedule.name", ""),
    "lr_scheduler": ("schedule.name", ""),
    "lr_scheduler_type": ("schedule.name", ""),
    "warmup": ("schedule.warmup_steps", ""),
    "warmup_iters": ("schedule.warmup_steps", ""),
    "lr_warmup_steps": ("schedule.warmup_steps", ""),
    "warmup_fraction": ("schedule.warmup_ratio", ""),
    "batch_size": ("train.global_batch_size", "sequences per optimizer step"),
    "train_batch_size": ("train.global_batch_size", "sequences per optimizer step"),
    "gbs": ("train.global_batch_size", "sequences per optimizer step"),
    "mbs": ("train.micro_batch_size", "sequences per forward pass"),
    "local_batch_size": ("train.micro_batch_size", "sequences per forward pass"),
    "device_batch_size": ("train.micro_batch_size", "sequences per forward pass"),
    "per_device_train_batch_size": ("train.micro_batch_size", "sequences per forward pass"),
    "per_device_eval_batch_size": ("evaluate.batch_size", ""),
    "gradient_accumulation_steps": (
        "train.global_batch_size",
        "accumulation follows from it: global_batch_size / micro_batch_size, per rank",
    ),
    "grad_accum_steps": (
        "train.global_batch_size",
        "accumulation follows from it: global_batch_size / micro_batch_size, per rank",
    ),
    "seq_len": ("data.sequence_length", ""),
    "seq_length": ("data.sequence_length", ""),
    "max_seq_length": ("data.sequence_length", ""),
    "max_seq_len": ("data.sequence_length", ""),
    "max_length": ("data.sequence_length", ""),
    "cutoff_len": ("data.sequence_length", ""),
    "block_size": ("data.sequence_length", ""),
    "context_length": ("data.sequence_length", ""),
    "max_steps": ("train.steps", ""),
    "num_steps": ("train.steps", ""),
    "max_iters": ("train.steps", ""),
    "train_iters": ("train.steps", ""),
    "total_steps": ("train.steps", ""),
    "num_epochs": ("train.epochs", ""),
    "max_epochs": ("train.epochs", ""),
    "num_train_epochs": ("train.epochs", ""),
    "max_tokens": ("train.tokens", ""),
    "num_tokens": ("train.tokens", ""),
    "max_train_tokens": ("train.tokens", ""),
    "grad_clip": ("train.max_grad_norm", ""),
    "clip_grad": ("train.max_grad_norm", ""),
    "gradient_clipping": ("train.max_grad_norm", ""),
    "gradient_clip_val": ("train.max_grad_norm", ""),
    "dtype": ("train.precision", ""),
    "torch_dtype": ("train.precision", ""),
    "bf16": ("train.precision", "mixed_bf16 or bf16"),
    "fp16": ("train.precision", "mixed_bf16, bf16 or fp32"),
    "mixed_precision": ("train.precision", ""),
    "torch_compile": ("train.compile", ""),
    "gradient_checkpointing": ("train.activation_checkpointing", ""),
    "activation_checkpoint": ("train.activation_checkpointing", ""),
    "recompute": ("train.activation_checkpointing", ""),
    "model_name_or_path": ("model.pretrained", ""),
    "pretrained_model_name_or_path": ("model.pretrained", ""),
    "model_name": ("model.pretrained", ""),
    "init_from": ("model.pretrained", ""),
    "attn_implementation": ("model.attention", ""),
    "flash_attn": ("model.attention", ""),
    "tokenizer_name_or_path": ("tokenizer.pretrained", ""),
    "tokenizer_name": ("tokenizer.pretrained", ""),
    "add_bos": ("tokenizer.prepend_bos", ""),
    "add_eos": ("tokenizer.append_eos", ""),
    "dataset": ("data.train", "a list of sources, each with a path"),
    "datasets": ("data.train", "a list of sources, each with a path"),
    "train_file": ("data.train", "a list of sources, each with a path"),
    "validation_file": ("data.validation", "held-out texts by name, each with a path"),
    "data_path": ("data.train", "a list of sources, each with a path"),
    "val": ("data.validation", "held-out texts by name, each with a path"),
    "valid": ("data.validation", "held-out texts by name, each with a path"),
    "val_size": ("data.validation", "{domain: {share: 0.01}} holds out a hundredth"),
    "files": ("data.train.0.path", ""),
    "file": ("data.train.0.path", ""),
    "text_column": ("data.train.0.text_key", ""),
    "text_field": ("data.train.0.text_key", ""),
    "packing_strategy": ("data.packing", ""),
    "num_workers": ("data.prepare.workers", ""),
    "num_proc": ("data.prepare.workers", ""),
    "preprocessing_num_workers": ("data.prepare.workers", ""),
    "save_steps": ("checkpoint.every_steps", ""),
    "save_interval": ("checkpoint.every_steps", ""),
    "save_every": ("checkpoint.every_steps", ""),
    "ckpt_every_steps": ("checkpoint.every_steps", ""),
    "save_total_limit": ("checkpoint.keep_last", ""),
    "async_save": ("checkpoint.asynchronous", ""),
    "eval_steps": ("evaluate.every_steps", ""),
    "eval_interval": ("evaluate.every_steps", ""),
    "eval_every": ("evaluate.every_steps", ""),
    "val_every_steps": ("evaluate.every_steps", ""),
    "eval_iters": ("evaluate.tokens", "counted in tokens"),
    "eval_batch_size": ("evaluate.batch_size", ""),
    "max_new_tokens": ("evaluate.sample_tokens", ""),
    "logging_steps": ("console.log_every_steps", ""),
    "log_interval": ("console.log_every_steps", ""),
    "log_every": ("console.log_every_steps", ""),
    "report_to": ("trackers", "a list, as in [{name: tensorboard}]"),
    "logger": ("trackers", "a list, as in [{name: tensorboard}]"),
    "wandb": ("trackers", "a list, as in [{name: wandb}]"),
    "tensorboard": ("trackers", "a list, as in [{name: tensorboard}]"),
    "output_dir": ("run.directory", "the run goes to <directory>/<name>"),
    "out_dir": ("run.directory", "the run goes to <directory>/<name>"),
    "run_name": ("run.name", ""),
    "experiment_name": ("run.name", ""),
    "eval": ("evaluate", ""),
    "evaluation": ("evaluate", ""),
    "training": ("train", ""),
    "trainer": ("train", ""),
    "logging": ("console", ""),
    "checkpointing": ("checkpoint", ""),
    "random_seed": ("run.seed", ""),
    "rng": ("run.seed", ""),
    "lr_schedule": ("schedule", ""),
}
"""The word of another tool -> (key here, remark)."""


@dataclass(frozen=True)
class Suggestion:
    """The key that was probably meant, and a remark on it."""

    location: Location
    remark: str = ""


def suggest_key(location: Location) -> Optional[Suggestion]:
    """The known key nearest to the unknown one at `location`.

    Tried in turn: the word other tools use; a key of this section that begins with it; the same key in another section; a
    similar key of this section (a typing error); a similar key elsewhere.
    """
    parent, key = location[:-1], str(location[-1])
    plain = key.replace("-", "_").lower()
    known = {dotted(found): found for found in all_keys()}
    section = section_of(type_at(parent)) if parent else None
    siblings = list(section.model_fields) if section else [name for name in known if "." not in name]
    if plain in siblings:
        return Suggestion((*parent, plain))
    if plain in SYNONYMS and SYNONYMS[plain][0] in known:
        target, remark = SYNONYMS[plain]
        return Suggestion(_same_place(known[target], parent), remark)
    if len(plain) >= 4 and (longer := [name for name in siblings if name.startswith(f"{plain}_")]):
        return Suggestion((*parent, longer[0]))
    elsewhere = [found for found in known.values() if found[-1] == plain]
    if len(elsewhere) == 1 or (elsewhere and not get_close_matches(plain, siblings, n=1, cutoff=0.75)):
        return Suggestion(_same_place(elsewhere[0], parent)) if len(elsewhere) <= 3 else None
    if near := get_close_matches(plain, siblings, n=1, cutoff=0.65):
        return Suggestion((*parent, near[0]))
    if len(plain) >= 4 and (longer := [name for name in siblings if name.startswith(plain)]):
        return Suggestion((*parent, longer[0]))
    names = {str(found[-1]): found for found in reversed(list(known.values()))}
    if near := get_close_matches(plain, list(names), n=1, cutoff=0.8):
        return Suggestion(_same_place(names[near[0]], parent))
    return None


def _same_place(found: Location, parent: Location) -> Location:
    """`data.train.0.path` suggested inside `data.train.3` is `data.train.3.path`."""
    if len(parent) >= len(found) - 1 and type_at(parent) is type_at(found[:-1]) and type_at(parent) is not None:
        return (*parent, found[-1])
    return found
