"""UnslothTrainingArguments: the training settings of a notebook as sections of a steep configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steep.core.errors import ConfigError
from steep.unsloth.translate import check_keys, refuse, say_ignored

CALL = "UnslothTrainingArguments"

DEFAULTS: dict[str, Any] = {
    # transformers' TrainingArguments where a notebook leaves them out
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "embedding_learning_rate": None,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_ratio": 0.0,
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "bf16": False,
    "fp16": False,
    "seed": 42,
    "output_dir": "outputs",
    "logging_steps": 1,
    "save_steps": None,
    "save_total_limit": None,
    "eval_steps": None,
    "report_to": "none",
    "max_seq_length": None,
    "max_length": None,
    "dataset_text_field": None,
    "packing": None,
    "per_device_eval_batch_size": None,
    "gradient_checkpointing": None,
    "torch_compile": False,
    "run_name": None,
}

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit_torchao",
    "paged_adamw_32bit": "adamw",
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "galore_adamw": "galore",
    "schedule_free_adamw": "schedule_free_adamw",
}

SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear", "final_ratio": 0.0},
    "cosine": {"name": "cosine", "final_ratio": 0.0},
    "cosine_with_min_lr": {"name": "cosine", "final_ratio": 0.0},
    "constant": {"name": "constant"},
    "constant_with_warmup": {"name": "constant"},
    "inverse_sqrt": {"name": "inverse_sqrt", "final_ratio": 0.01},
    "warmup_stable_decay": {"name": "wsd", "final_ratio": 0.0},
}

_LOADER = "batches are read ahead by steep's own loader"
_PROCESS = "training runs in one process"
_PACKED = "documents are packed, so nothing is padded"
_LOGGED = "every step is logged; logging_steps decides what the screen shows"
_NOT_SENT = "nothing is sent anywhere; steep export writes a folder that can be uploaded"
_TRAINED_PRECISION = "scores are computed in the precision of training"

MEANS_NOTHING = {
    "dataset_num_proc": "text is read by steep's own processes",
    "dataset_batch_size": "text is read by steep's own processes",
    "dataset_kwargs": "text is tokenized as it is",
    "remove_unused_columns": "only the text column is read",
    "eos_token": "the tokenizer's own end of text follows every document",
    "pad_token": _PACKED,
    "padding_free": _PACKED,
    "packing_strategy": "documents are kept whole where they fit, and none is truncated",
    "eval_packing": "held-out text is scored document by document",
    "group_by_length": _PACKED,
    "train_sampling_strategy": _PACKED,
    "length_column_name": _PACKED,
    "dataloader_num_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_drop_last": "nothing is dropped",
    "dataloader_pin_memory": "steep pins memory where there is a GPU",
    "ddp_find_unused_parameters": _PROCESS,
    "ddp_backend": _PROCESS,
    "ddp_timeout": _PROCESS,
    "local_rank": _PROCESS,
    "average_tokens_across_devices": _PROCESS,
    "save_strategy": "the end is always saved; save_steps saves in between",
    "save_safetensors": "only safetensors files are written",
    "save_only_model": "a checkpoint holds what a resume needs",
    "save_on_each_node": _PROCESS,
    "overwrite_output_dir": "every run has its own folder",
    "eval_strategy": "the start and the end are always scored; eval_steps scores in between",
    "fp16_full_eval": _TRAINED_PRECISION,
    "bf16_full_eval": _TRAINED_PRECISION,
    "logging_strategy": _LOGGED,
    "logging_first_step": "the first step always has a line",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "logging_dir": "the run's folder has everything",
    "log_level": _LOGGED,
    "include_num_input_tokens_seen": "every line has the tokens seen",
    "include_tokens_per_second": "every line has the tokens per second",
    "skip_memory_metrics": "every line has the memory",
    "disable_tqdm": "",
    "gradient_checkpointing_kwargs": "layers are computed again without reentrant autograd",
    "torch_empty_cache_steps": "the allocator's cache is left alone",
    "optim_target_modules": "the adapter decides what is trained",
    "tf32": "matrix products run in the precision that the device's kernels use",
    "use_liger_kernel": "the loss is computed in chunks anyway",
    "push_to_hub": _NOT_SENT,
    "hub_model_id": _NOT_SENT,
    "hub_token": _NOT_SENT,
    "hub_private_repo": _NOT_SENT,
    "hub_strategy": _NOT_SENT,
    "data_seed": "seed decides the order of the data too",
}

CANNOT = {
    "neftune_noise_alpha": "noise on embeddings is for instruction tuning",
    "label_smoothing_factor": "the loss is the negative log-likelihood itself",
    "completion_only_loss": "the loss is over every token of a document",
    "assistant_only_loss": "the loss is over every token of a document",
    "deepspeed": _PROCESS,
    "fsdp": _PROCESS,
    "use_cpu": "hide the GPU: CUDA_VISIBLE_DEVICES=",
    "auto_find_batch_size": "`steep plan --fit` lists what fits",
    "load_best_model_at_end": "the best checkpoint is kept in the run's folder, which from_pretrained opens",
    "resume_from_checkpoint": "`steep train <run>/config.yaml --resume` continues a run",
    "optim_args": "the optimizer section of a steep configuration has every option",
}


class UnslothTrainingArguments:
    """Settings of a training, under the names that transformers, TRL and Unsloth give them.

    Every name is an attribute, with transformers' default where it is left out. Says which names mean nothing here. Raises
    ConfigError for an unknown name, and for what would change the result and cannot be done.
    """

    def __init__(self, **given: Any):
        check_keys(CALL, given, [*DEFAULTS, *MEANS_NOTHING, *CANNOT])
        refuse(CALL, given, CANNOT)
        say_ignored(CALL, given, MEANS_NOTHING)
        for key, default in DEFAULTS.items():
            setattr(self, key, given.get(key, default))
        if self.fp16 and self.bf16:
            raise ConfigError(f"{CALL}: fp16 and bf16 are both true; give one of them")

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def sections(self) -> dict[str, Any]:
        """`train`, `optimizer`, `schedule`, `checkpoint`, `evaluate`, `console`, `trackers` and `run` of a steep configuration.

        Raises ConfigError for an optimizer, schedule or tracker without a counterpart.
        """
        length = {"steps": self.max_steps} if self.max_steps > 0 else {"epochs": self.num_train_epochs}
        name = _counterpart("optim", self.optim, OPTIMIZERS)
        optimizer: dict[str, Any] = {
            "name": name,
            "learning_rate": self.learning_rate,
            "embedding_learning_rate": self.embedding_learning_rate,
            "weight_decay": self.weight_decay,
        }
        if name in ("adamw", "adamw_8bit", "adamw_8bit_torchao", "schedule_free_adamw", "galore"):
            optimizer |= {"betas": (self.adam_beta1, self.adam_beta2), "eps": self.adam_epsilon}
        if 0 < self.logging_steps < 1:
            raise ConfigError(
                f"{CALL}: logging_steps={self.logging_steps} is a share of the run; give steps, such as 10"
            )
        kept = {"keep_last": self.save_total_limit} if self.save_total_limit else {}
        return {
            "run": {"directory": str(self.output_dir), "seed": self.seed},
            "train": {"max_grad_norm": self.max_grad_norm or None, "compile": bool(self.torch_compile), **length},
            "optimizer": optimizer,
            "schedule": self._schedule(),
            "checkpoint": {"every_steps": self.save_steps, **kept},
            "evaluate": {"every_steps": self.eval_steps, "batch_size": self.per_device_eval_batch_size},
            "console": {"log_every_steps": max(1, int(self.logging_steps))},
            "trackers": _trackers(self.report_to),
        }

    def _schedule(self) -> dict[str, Any]:
        schedule = dict(_counterpart("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES))
        options = dict(self.lr_scheduler_kwargs or {})
        if str(self.lr_scheduler_type).endswith("cosine_with_min_lr"):
            lowest = options.pop("min_lr", None)
            ratio = options.pop("min_lr_rate", None)
            if (lowest is None) == (ratio is None):
                raise ConfigError(f"{CALL}: cosine_with_min_lr needs min_lr or min_lr_rate in lr_scheduler_kwargs")
            schedule["final_ratio"] = ratio if lowest is None else lowest / self.learning_rate
        if options:
            raise ConfigError(f"{CALL}: lr_scheduler_kwargs has {', '.join(options)}, which has no counterpart here")
        if self.lr_scheduler_type == "constant":
            return {**schedule, "warmup_steps": 0}
        if 0 < self.warmup_steps < 1:  # transformers 5: a share of the run
            return {**schedule, "warmup_ratio": self.warmup_steps}
        warmup = {"warmup_steps": self.warmup_steps} if self.warmup_steps else {"warmup_ratio": self.warmup_ratio}
        return {**schedule, **warmup}


def _counterpart(key: str, value: Any, table: dict[str, Any]) -> Any:
    name = str(getattr(value, "value", value))
    if name not in table:
        raise ConfigError(f"{CALL}: {key}={name!r} has no counterpart here. Supported: {', '.join(table)}")
    return table[name]


def _trackers(report_to: Any) -> list[dict[str, Any]]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    wanted = [name for name in names if name not in ("none", "all")]
    for name in wanted:
        if name != "tensorboard":
            raise ConfigError(
                f"{CALL}: report_to={name!r} is not supported; use 'tensorboard', or 'none' (metrics.jsonl has everything)"
            )
    return [{"name": name} for name in wanted]
