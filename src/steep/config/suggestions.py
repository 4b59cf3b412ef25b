"""The key that was probably meant: the words that other tools use, then the nearest keys of this configuration."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Optional

from steep.config.keys import Location, all_keys, dotted, section_of, type_at

_WORDS_BY_KEY = (
    ("optimizer.learning_rate", "", "lr max_lr peak_lr"),
    ("schedule.final_ratio", "a share of the peak, not a rate", "min_lr min_learning_rate"),
    ("schedule.final_ratio", "", "min_lr_ratio"),
    ("optimizer.weight_decay", "", "wd"),
    ("optimizer.betas", "a list of two numbers", "beta1 beta2 adam_beta1 adam_beta2"),
    ("optimizer.eps", "", "adam_epsilon epsilon"),
    ("optimizer.name", "", "optim"),
    ("schedule.name", "", "scheduler lr_scheduler lr_scheduler_type"),
    ("schedule.warmup_steps", "", "warmup warmup_iters lr_warmup_steps"),
    ("schedule.warmup_ratio", "", "warmup_fraction"),
    ("train.global_batch_size", "sequences per optimizer step", "batch_size train_batch_size gbs"),
    (
        "train.micro_batch_size",
        "sequences per forward pass",
        "mbs local_batch_size device_batch_size per_device_train_batch_size",
    ),
    ("evaluate.batch_size", "", "per_device_eval_batch_size eval_batch_size"),
    (
        "train.global_batch_size",
        "accumulation follows from it: global_batch_size / micro_batch_size, per rank",
        "gradient_accumulation_steps grad_accum_steps",
    ),
    (
        "data.sequence_length",
        "",
        "seq_len seq_length max_seq_length max_seq_len max_length cutoff_len block_size context_length",
    ),
    ("train.steps", "", "max_steps num_steps max_iters train_iters total_steps"),
    ("train.epochs", "", "num_epochs max_epochs num_train_epochs"),
    ("train.tokens", "", "max_tokens num_tokens max_train_tokens"),
    ("train.max_grad_norm", "", "grad_clip clip_grad gradient_clipping gradient_clip_val"),
    ("train.precision", "", "dtype torch_dtype mixed_precision"),
    ("train.precision", "mixed_bf16 or bf16", "bf16"),
    ("train.precision", "mixed_fp16", "fp16 float16"),
    ("train.compile", "", "torch_compile"),
    ("train.activation_checkpointing", "", "gradient_checkpointing activation_checkpoint recompute"),
    ("model.pretrained", "", "model_name_or_path pretrained_model_name_or_path model_name init_from"),
    ("model.attention", "", "attn_implementation flash_attn"),
    ("tokenizer.pretrained", "", "tokenizer_name_or_path tokenizer_name"),
    ("tokenizer.prepend_bos", "", "add_bos"),
    ("tokenizer.append_eos", "", "add_eos"),
    ("data.train", "a list of sources, each with a path", "dataset datasets train_file data_path"),
    ("data.validation", "held-out texts by name, each with a path", "validation_file val valid"),
    ("data.validation", "{domain: {share: 0.01}} holds out a hundredth", "val_size"),
    ("data.train.0.path", "", "files file"),
    ("data.train.0.text_key", "", "text_column text_field"),
    ("data.packing", "", "packing_strategy"),
    ("data.prepare.workers", "", "num_workers num_proc preprocessing_num_workers"),
    ("checkpoint.every_steps", "", "save_steps save_interval save_every ckpt_every_steps"),
    ("checkpoint.keep_last", "", "save_total_limit"),
    ("checkpoint.asynchronous", "", "async_save"),
    ("evaluate.every_steps", "", "eval_steps eval_interval eval_every val_every_steps"),
    ("evaluate.tokens", "counted in tokens", "eval_iters"),
    ("evaluate.sample_tokens", "", "max_new_tokens"),
    ("console.log_every_steps", "", "logging_steps log_interval log_every"),
    ("trackers", "a list, as in [{name: tensorboard}]", "report_to logger tensorboard"),
    ("trackers", "a list, as in [{name: wandb}]", "wandb"),
    ("run.directory", "the run goes to <directory>/<name>", "output_dir out_dir"),
    ("run.name", "", "run_name experiment_name"),
    ("evaluate", "", "eval evaluation"),
    ("train", "", "training trainer"),
    ("console", "", "logging"),
    ("checkpoint", "", "checkpointing"),
    ("run.seed", "", "random_seed rng"),
    ("adapter.rank", "", "lora_rank lora_r r"),
    ("adapter.alpha", "", "lora_alpha"),
    ("adapter.dropout", "", "lora_dropout"),
    ("adapter.targets", "", "lora_target lora_target_modules target_modules"),
    ("adapter.type", "lora or dora", "use_dora finetuning_type"),
    ("adapter", "a mapping, as in {rank: 16}", "lora peft"),
    ("schedule", "", "lr_schedule"),
)
"""(key here, remark, the words of other tools for it)."""

SYNONYMS = {word: (key, remark) for key, remark, words in _WORDS_BY_KEY for word in words.split()}
"""The word of another tool -> (key here, remark)."""


@dataclass(frozen=True)
class Suggestion:
    """The key that was probably meant, and a remark on it."""

    location: Location
    remark: str = ""
    others: tuple[Location, ...] = ()
    """More keys of that name in other sections, for a key that was given without its section."""


MOST_OTHERS = 7


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
        if len(elsewhere) > (3 if parent else 1 + MOST_OTHERS):
            return None
        return Suggestion(_same_place(elsewhere[0], parent), others=() if parent else tuple(elsewhere[1:]))
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
