"""The same questions to the trained and the exported model, and how far the answers may differ.

In: texts as token ids, a prompt, strings. Out: logits, a greedy continuation, ids. Three comparisons, each with its own bound:
logits against the trained model *in the export's own rounding* (same numbers, another program: nearly exact); the next-token
distributions against the trained model in fp32 (the cost of rounding); the greedy continuation, which may differ from the
trained model's only where that model's own choice was closer to a tie than the logits are allowed to differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from steep.core.errors import ModelError
from steep.core.units import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

GREEDY_TOKENS = 32
"""Length of the greedy continuation that is compared."""
ROUNDING = 1e-5
"""How much fp32 sums in another order differ, as a share of the logits' spread: tens of units in the last place (2**-23)."""


@dataclass(frozen=True)
class Questions:
    """The questions to both programs."""

    texts: Mapping[str, list[int]]
    """Name -> token ids whose next-token logits are compared."""
    prompt: list[int]
    new_tokens: int
    strings: Mapping[str, str] = field(default_factory=dict)
    """Name -> string to encode; only for formats that carry the rules of their own tokenizer."""


@dataclass
class Answers:
    """The answers of one program."""

    program: str
    logits: dict[str, NDArray[np.float32]]
    """Per text (tokens, vocabulary) fp32."""
    greedy: list[int]
    greedy_logits_TV: NDArray[np.float32] | None = None
    """(new tokens, vocabulary): the logits that each greedy token was chosen from; None if they were not recorded."""
    ids: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """How far an exported model may differ from the trained one."""

    logits_ratio: float
    """Largest difference of one logit from the trained model in the same rounding, over the logits' standard deviation."""
    kl_nats: float
    """Mean Kullback-Leibler divergence per token from the trained model in fp32."""
    loss_change: float
    """Largest change of the loss in nats per token from the trained model in fp32."""
    reason: str
    share: float = 1.0
    """Of the positions that `logits_ratio` must hold for. Below 1 for mixtures of experts in other kernels: where a router's
    choice is nearly a tie, rounding takes another expert, and the logits of that position are others."""


@dataclass(frozen=True)
class Parity:
    """How an exported model compares with the trained one, in numbers."""

    program: str
    largest_logit_difference: float
    """Against the trained model in the export's rounding."""
    logits_ratio: float
    """The same as a share of the logits' standard deviation."""
    trained_nats_per_token: float
    """Of the trained model in fp32, over the verification texts."""
    nats_per_token: float
    """Of the exported model there."""
    kl_nats: float
    top1_agreement_ratio: float
    """Share of positions where the exported model's likeliest token is the trained model's (in fp32)."""
    greedy_tokens: int
    greedy_tokens_equal: int
    """Tokens from the start that equal those of the trained model in the export's rounding."""
    tokens: int
    """Positions compared."""
    position_ratios: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(0, np.float32), repr=False, compare=False
    )
    """(tokens,): the largest difference at each position, as `logits_ratio`; not a number where a logit is none."""

    @property
    def loss_change(self) -> float:
        """Nats per token of the exported model minus those of the trained one."""
        return self.nats_per_token - self.trained_nats_per_token

    def __str__(self) -> str:
        return (
            f"{self.program}: over {self.tokens} tokens logits differ by at most {self.largest_logit_difference:.2g} "
            f"({self.logits_ratio:.1e} of their spread) from the same rounding; against the trained model in fp32 "
            f"perplexity {np.exp(self.nats_per_token):.4f} for {np.exp(self.trained_nats_per_token):.4f} "
            f"({self.loss_change:+.1e} nats/token), "
            f"KL {self.kl_nats:.1e} nats, likeliest token equal in {self.top1_agreement_ratio:.1%}; greedy text equal for "
            f"{self.greedy_tokens_equal} of {self.greedy_tokens} tokens"
        )


def answer(model: Any, questions: Questions, program: str = "") -> Answers:
    """The answers of a transformers model, logits computed in its own dtype and returned in fp32."""
    import torch

    with torch.no_grad():
        logits = {
            name: _forward(model, ids, use_cache=False)[0][0].float().numpy() for name, ids in questions.texts.items()
        }
    greedy, greedy_logits_TV = _greedy(model, questions.prompt, questions.new_tokens)
    return Answers(program, logits, greedy, greedy_logits_TV)


def _greedy(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], NDArray[np.float32]]:
    """The greedy continuation, past any end-of-text token, with the logits it was chosen from.

    A model without a key-value cache (recurrent ones, and those that have none) reads everything again for each token.
    """
    try:
        return _continue(model, prompt, new_tokens, use_cache=True)
    except (
        RuntimeError,
        IndexError,
    ):  # a few families fail with their own cache in transformers (cpmant, hrm_text, xlstm)
        return _continue(model, prompt, new_tokens, use_cache=False)


def _continue(model: Any, prompt: list[int], new_tokens: int, use_cache: bool) -> tuple[list[int], NDArray[np.float32]]:
    import torch

    tokens: list[int] = []
    rows: list[NDArray[np.float32]] = []
    cache, step = None, prompt
    with torch.no_grad():
        while len(tokens) < new_tokens:
            logits_1TV, cache = _forward(model, step, past_key_values=cache, use_cache=use_cache)
            row = logits_1TV[0, -1].float().numpy()
            rows.append(row)
            tokens.append(int(row.argmax()))
            step = tokens[-1:] if cache is not None else prompt + tokens
    return tokens, np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def _forward(model: Any, ids: list[int], **options: Any) -> tuple[Any, Any]:
    """Logits (1, T, V) and the key-value cache after `ids`, None for a model without one; it gets the options that it names."""
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper passes everything on
    known = inspect.signature(inner.forward).parameters
    caches = "past_key_values" in known
    taken = {name: value for name, value in options.items() if name in known and (caches or name != "use_cache")}
    out = model(input_ids=torch.tensor([ids]), **taken)
    logits = out[0] if isinstance(out, tuple) else getattr(out, "logits", out)
    return logits, getattr(out, "past_key_values", None) if options.get("use_cache") else None


def compare(trained: Answers, expected: Answers, found: Answers, texts: Mapping[str, list[int]]) -> Parity:
    """The numbers of one exported model. trained: in fp32. expected: trained, in the export's rounding.

    Raises ModelError if the shapes differ.
    """
    for name, expected_TV in expected.logits.items():
        shape = found.logits[name].shape
        if shape != expected_TV.shape:
            raise ModelError(
                f"the exported model gives logits of shape {shape}, the trained model of shape {expected_TV.shape}"
            )
    differences = np.concatenate([np.abs(found.logits[name] - expected.logits[name]).max(-1) for name in texts])
    difference = float(differences.max())
    if any(not np.isfinite(logits_TV).all() for logits_TV in found.logits.values()):
        difference = float("nan")
    sums = np.sum([_sums(trained.logits[name], found.logits[name], ids) for name, ids in texts.items()], axis=0)
    positions, predicted = sums[4], sums[5]
    return Parity(
        program=found.program,
        largest_logit_difference=difference,
        logits_ratio=difference / spread(expected),
        trained_nats_per_token=float(sums[0] / predicted),
        nats_per_token=float(sums[1] / predicted),
        kl_nats=float(sums[2] / positions),
        top1_agreement_ratio=float(sums[3] / positions),
        greedy_tokens=len(expected.greedy),
        greedy_tokens_equal=_equal_tokens(expected.greedy, found.greedy),
        tokens=int(positions),
        position_ratios=(differences / spread(expected)).astype(np.float32),
    )


def spread(answers: Answers) -> float:
    """The standard deviation of all its logits."""
    return float(np.concatenate([logits.reshape(-1) for logits in answers.logits.values()]).std())


def check(parity: Parity, expected: Answers, bounds: Bounds, found_greedy: Sequence[int], what: str) -> None:
    """Raises ModelError with the numbers if `parity` is beyond `bounds`. what: names the export in the message."""
    wrong = []
    within = float((parity.position_ratios <= bounds.logits_ratio).mean())
    enough = np.isfinite(parity.logits_ratio) and within >= bounds.share
    if not (parity.logits_ratio <= bounds.logits_ratio or enough):
        allowed = f"{bounds.logits_ratio:.1e} is allowed"
        if bounds.share < 1:
            allowed += f" for all but {1 - bounds.share:.0%} of the positions; it holds for {within:.1%}"
        wrong.append(
            f"its logits differ by up to {parity.largest_logit_difference:.3g}, {parity.logits_ratio:.1e} of their spread, "
            f"and {allowed}"
        )
    if not parity.kl_nats <= bounds.kl_nats:
        wrong.append(f"KL is {parity.kl_nats:.2e} nats per token, and {bounds.kl_nats:.1e} is allowed")
    if not abs(parity.loss_change) <= bounds.loss_change:
        wrong.append(
            f"its loss differs by {parity.loss_change:+.2e} nats/token, and {bounds.loss_change:.1e} is allowed"
        )
    wrong += _greedy_problem(parity, expected, found_greedy)
    if wrong:
        raise ModelError(
            f"{what} is not the trained model: {'; '.join(wrong)} ({bounds.reason}). All numbers: {parity}. "
            "Nothing was written."
        )


def _greedy_problem(parity: Parity, expected: Answers, found: Sequence[int]) -> list[str]:
    """If no logit differs by more than d, another token can win only where the winner led by less than 2 d. d is twice the
    largest difference on the texts, since the continuation is another context."""
    at = parity.greedy_tokens_equal
    if at == parity.greedy_tokens:
        return []
    if len(found) <= at or expected.greedy_logits_TV is None:
        return [f"its greedy text ends after {counted(len(found), 'token')}"]
    row = expected.greedy_logits_TV[at]
    margin = float(row.max() - row[found[at]])
    allowed = 4 * parity.largest_logit_difference + ROUNDING * spread(expected)
    if margin <= allowed:
        return []
    return [
        f"greedy token {at + 1} differs, where the trained model's choice led by {margin:.3g} (up to {allowed:.3g} is a tie)"
    ]


def _equal_tokens(expected: Sequence[int], found: Sequence[int]) -> int:
    pairs = zip(expected, found, strict=False)
    return next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(found)))


def _sums(trained_TV: NDArray[np.float32], found_TV: NDArray[np.float32], ids: list[int]) -> NDArray[np.float64]:
    """(6,) sums over a text: -log p of the trained and of the found model, KL, agreeing positions, positions, predicted tokens.

    KL(trained, found) = sum_V exp(trained_V) (trained_V - found_V), both log-probabilities. 64 rows at a time bound the memory.
    """
    total = np.zeros(6)
    for start in range(0, len(ids), 64):
        rows = slice(start, start + 64)
        trained, found = _log_softmax(trained_TV[rows]), _log_softmax(found_TV[rows])
        targets = np.array(ids[start + 1 : start + 65], dtype=np.int64)
        picked = np.arange(len(targets))
        total += [
            -trained[picked, targets].sum(),
            -found[picked, targets].sum(),
            (np.exp(trained) * (trained - found)).sum(),
            (trained.argmax(axis=-1) == found.argmax(axis=-1)).sum(),
            len(trained),
            len(targets),
        ]
    return total


def _log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    logits = logits_TV.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def first_difference(
    expected: Mapping[str, list[int]], found: Mapping[str, list[int]]
) -> dict[str, tuple[int, int, int]]:
    """Per string with different ids: (index of the first difference, expected id, found id), -1 for past the end."""
    different = {}
    for name, ids in expected.items():
        other = found[name]
        if ids != other:
            at = _equal_tokens(ids, other)
            different[name] = (at, ids[at] if at < len(ids) else -1, other[at] if at < len(other) else -1)
    return different
