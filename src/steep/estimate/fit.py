"""`steep plan --fit SIZE`: the settings with which a run fits into a given amount of memory, fastest first.

In: a RunPlan. Out: proposals, each a few configuration keys with the memory they need. Main choice: settings that keep the result
come first (micro-batches, checkpointing, a smaller chunk of logits); settings that change it (8-bit optimizer states, a
4-bit base) are proposed only where none of those fits, and are marked. Weakness: proposals are ordered by arithmetic (how much is
computed again, then how many micro-batches a step takes), not by measured time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Union

from steep.config.load import ConfigLike, as_config
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.core.public import Readable, public
from steep.core.section import Target
from steep.core.units import format_bytes, parse_bytes
from steep.estimate.run_plan import RunPlan, plan_unchecked
from steep.estimate.structure import measure_structure
from steep.models.config import ModelConfig

SMALL_LOGITS_BYTES = 8 * 2**20
MOST_PROPOSALS = 5

CHECKPOINTING: list[tuple[Any, float]] = [
    # setting, work of a step over that without checkpointing: 1 + (share of the forward pass that runs twice) / 3
    (False, 1.0),
    ("selective", 1.05),
    ({"mode": "every_nth", "every": 2}, 1 + 1 / 6),
    (True, 1 + 1 / 3),
    ({"mode": "full", "offload": True}, 1 + 1 / 3 + 0.02),
]


@dataclass(frozen=True)
class Proposal:
    """Settings that fit."""

    changes: dict[str, Any]
    """Dotted configuration keys and their values; empty where the run fits as it is."""
    memory: dict[str, int]
    """Bytes by part."""
    work_ratio: float
    """Arithmetic of a step over that without checkpointing."""
    micro_batch_size: int
    changes_result: bool = False

    @property
    def peak_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.memory.values())

    def to_mapping(self) -> dict[str, Any]:
        """The proposal as JSON values."""
        return {
            "changes": self.changes,
            "memory": {**self.memory, "total": self.peak_bytes},
            "work_ratio": round(self.work_ratio, 3),
            "changes_result": self.changes_result,
        }

    def to_text(self) -> str:
        """One line."""
        keys = " ".join(f"--{key} {_written(value)}" for key, value in self.changes.items()) or "as it is"
        mark = "  (changes the result)" if self.changes_result else ""
        return f"  {format_bytes(self.peak_bytes):>9}  {self.work_ratio:.2f} x the work  {keys}{mark}"


@dataclass(frozen=True, repr=False)
class MemoryFit(Readable):
    """What fits into `limit_bytes`, fastest first."""

    limit_bytes: int
    proposals: list[Proposal]
    smallest: Proposal
    """The settings that need the least memory of all that were tried."""

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        found = [proposal.to_mapping() for proposal in self.proposals]
        return {"limit_bytes": self.limit_bytes, "fits": found, "smallest": self.smallest.to_mapping()}

    def to_text(self) -> str:
        if not self.proposals:
            return (
                f"nothing that steep can set makes this run fit into {format_bytes(self.limit_bytes)}. The least:\n"
                f"{self.smallest.to_text()}\n"
                "  What helps: a shorter data.sequence_length, an adapter of lower rank, a smaller model."
            )
        head = f"fits into {format_bytes(self.limit_bytes)}, fastest first:"
        return "\n".join([head, *(proposal.to_text() for proposal in self.proposals)])


@public
def plan_fit(config: ConfigLike, size: Union[int, str], *, device: str = "auto", allow_code: bool = True) -> MemoryFit:
    """The settings with which a run fits into `size` of memory (bytes, or text such as `24GiB`), fastest first.

    Loads no weights, and makes several plans. config, device, allow_code: as for `steep.plan`. Raises a SteepError for text that
    is not a size, and for what cannot work.
    """
    try:
        limit_bytes = parse_bytes(size)
    except ValueError as error:
        raise ConfigError(f"fit: {error}") from None
    plan = plan_unchecked(as_config(config), device=device, allow_code=allow_code)
    on_cpu = plan.hardware.device_type == "cpu"  # where there is nothing to offload to
    settings = [row for row in CHECKPOINTING if not (on_cpu and isinstance(row[0], dict) and row[0].get("offload"))]
    tried: list[Proposal] = []
    for changes_result, base in _bases(plan.config):
        here = [_largest(plan, base, setting, work, limit_bytes, changes_result) for setting, work in settings]
        tried += here
        fitting = [proposal for proposal in here if proposal.peak_bytes <= limit_bytes]
        if fitting:
            fitting.sort(key=lambda proposal: (proposal.work_ratio, -proposal.micro_batch_size))
            break
    return MemoryFit(limit_bytes, fitting[:MOST_PROPOSALS], min(tried, key=lambda proposal: proposal.peak_bytes))


def _bases(config: RunConfig) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Changes to start from: none, smaller chunks of logits, then those that change the result. Each includes the one before."""
    changes: dict[str, Any] = {}
    yield False, dict(changes)
    if config.train.loss_chunk_bytes > SMALL_LOGITS_BYTES:
        changes["train.loss_chunk_bytes"] = "8MiB"
        yield False, dict(changes)
    if not isinstance(config.optimizer, Target) and config.optimizer.name == "adamw":
        changes["optimizer.name"] = "adamw_8bit"
        yield True, dict(changes)
    if config.adapter is not None and isinstance(config.model, ModelConfig) and config.model.quantize is None:
        changes["model.quantize"] = "nf4"
        yield True, dict(changes)


def _largest(
    plan: RunPlan, base: dict[str, Any], checkpointing: Any, work: float, limit_bytes: int, changes_result: bool
) -> Proposal:
    """The proposal with the largest micro-batch that fits; where none fits, the one with a micro-batch of one sequence."""
    batch = plan.sizes.global_batch_size
    sizes = [n for n in range(1, batch + 1) if batch % n == 0]
    propose = partial(_propose, plan, base, checkpointing, work, changes_result)
    best = propose(sizes[0])
    low, high = 0, len(sizes) - 1
    while best.peak_bytes <= limit_bytes and low < high:
        middle = (low + high + 1) // 2
        found = propose(sizes[middle])
        if found.peak_bytes <= limit_bytes:
            best, low = found, middle
        else:
            high = middle - 1
    return best


def _propose(
    plan: RunPlan, base: dict[str, Any], checkpointing: Any, work: float, changes_result: bool, micro_batch_size: int
) -> Proposal:
    wanted = {**base, "train.micro_batch_size": micro_batch_size, "train.activation_checkpointing": checkpointing}
    before = plan.config.to_mapping()
    mapping = changed(before, wanted)
    config = RunConfig.model_validate(mapping)
    accumulates, on_gpu = micro_batch_size < plan.sizes.global_batch_size, plan.hardware.device_type != "cpu"
    facts = measure_structure(config, micro_batch_size, accumulates, plan.precision, on_gpu, plan.vocabulary_rows)
    shown = {key: value for key, value in wanted.items() if _at(before, key) != _at(mapping, key)}
    if micro_batch_size == plan.sizes.micro_batch_size:
        shown.pop("train.micro_batch_size", None)
    memory = facts.memory.parts(plan.hardware.device_type, plan.process_bytes)
    return Proposal(shown, memory, work, micro_batch_size, changes_result)


def changed(mapping: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `mapping` with the values of dotted keys replaced; `mapping` itself is not changed."""
    result = dict(mapping)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        result[head] = changed(result.get(head) or {}, {rest: value}) if rest else value
    return result


def _at(mapping: dict[str, Any], key: str) -> Any:
    head, _, rest = key.partition(".")
    value = mapping.get(head)
    return _at(value or {}, rest) if rest else value


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{key}: {_written(part)}" for key, part in value.items()) + "}'"
    return str(value)
