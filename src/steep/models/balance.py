"""How evenly a mixture of experts uses its experts: the balancing loss, and the share of tokens that each expert gets.

In: what the routers of a forward pass return. Out: the loss with gradients, and counts. Main choices:

The loss is that of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6) for each layer by itself:
E * sum_i f_i * P_i, where f_i is the share of the assignments that expert i of E got, and P_i the mean of the router's
probability for it. It is 1 where all experts get the same, and E where one gets everything. The layers' losses are added.
`load_balancing_loss_func` of transformers averages f and P over all layers before it multiplies them, so that layers which are
uneven in opposite ways count as even, and its f adds up to the number of experts of a token instead of 1.

f and P are taken over each sequence by itself and weighted by its tokens, padding left out. So the loss of a step does not depend
on micro-batches or ranks: f over the whole step would need a forward pass over all of it before the first backward pass.
Weakness: even within a sequence is more than needed; text of one kind may want few experts (Qiu et al. 2025, arXiv:2501.11873).

Suffixes: B sequences, T tokens, N = B * T, E experts, C experts of a token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.batch import Batch
from steep.models.document_rows import DocumentRows, in_batch_order
from steep.models.mixture import Router, experts_per_token, find_routers

Scoring = Literal["softmax", "sigmoid", "probabilities"]
"""How a router makes probabilities: of its logits, or what it returns are probabilities already."""

BIAS_NAMES = ("correction_bias", "expert_bias")
"""Parts of the names of tensors that move the choice of experts and are not trained by gradients (arXiv:2408.15664)."""


FITTING_ERROR = 0.02
"""Largest mean difference of the logarithms of weights that rounding to bf16 explains, five times over."""


class Routing(NamedTuple):
    """What the routers did with a batch, by layer."""

    losses: Tensor
    """(layers,) fp32 with gradients: the balancing loss of each layer, summed over the batch's tokens without padding."""
    counts: list[Tensor]
    """(E,) fp32 of each layer: the assignments that each expert got, padding left out."""

    def detached(self) -> Routing:
        """The same without gradients."""
        return Routing(self.losses.detach(), self.counts)


def sum_routings(routings: list[Routing], num_tokens: int) -> Routing | None:
    """What the routers did with the micro-batches of a step: losses per token of the step, counts summed. None without any."""
    if not routings:
        return None
    losses = torch.stack([routing.losses for routing in routings]).sum(0) / max(1, num_tokens)
    return Routing(losses, [torch.stack(counts).sum(0) for counts in zip(*(r.counts for r in routings), strict=True)])


class RoutingRecorder:
    """Keeps what the routers of a model return while it is asked to. Adds a forward hook to each router.

    What a layer returns when it is computed again for its gradient is not kept, since nothing records then.
    """

    def __init__(self, model: nn.Module):
        self.routers: list[Router] = find_routers(model)
        self.chosen = experts_per_token(model) or 1
        self.scoring: list[Scoring] = ["softmax"] * len(self.routers)
        self._outputs: dict[int, list[Any]] | None = None
        self._probing = False
        for number, router in enumerate(self.routers):
            router.module.register_forward_hook(self._keeper(number), with_kwargs=True)

    def _keeper(self, number: int) -> Any:
        def keep(module: nn.Module, arguments: Any, named: Any, output: Any) -> None:
            if self._outputs is not None:
                self._outputs.setdefault(number, []).append(output)
                if self._probing:
                    self._learn_scoring(number, arguments, named)

        return keep

    @contextmanager
    def recording(self, probing: bool = False) -> Iterator[dict[int, list[Any]]]:
        """A mapping that the forward passes inside fill: number of the router -> what it returned, call by call.

        probing: find out how each router makes probabilities, too.
        """
        outputs: dict[int, list[Any]] = {}
        self._outputs, self._probing = outputs, probing
        try:
            yield outputs
        finally:
            self._outputs, self._probing = None, False

    def routing(
        self, outputs: dict[int, list[Any]], batch: Batch, rows: list[DocumentRows] | None = None
    ) -> Routing | None:
        """Loss and counts of a batch whose forward pass was recorded; None if no router ran.

        rows: what was run in place of the batch, one call each (`document_rows`); without it a router's last call counts.
        """
        losses, counts = [], []
        for number, calls in sorted(outputs.items()):
            read = [read_output(output, self.routers[number].index, self.chosen)[:2] for output in calls]
            logits_NE, chosen_NC = read[-1] if rows is None else (
                in_batch_order(list(parts), rows) for parts in zip(*read[-len(rows) :], strict=True)
            )  # fmt: skip
            probabilities_NE = probabilities(logits_NE, self.scoring[number])
            loss, counts_E = balancing_loss(probabilities_NE, chosen_NC, batch.tokens_mask())
            losses.append(loss)
            counts.append(counts_E)
        return Routing(torch.stack(losses), counts) if losses else None

    def num_experts(self, number: int, output: Any) -> int:
        """E of a router, from what it returned."""
        return read_output(output, self.routers[number].index, self.chosen)[0].shape[1]

    def _learn_scoring(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Find out how a router makes probabilities, from a copy with other weights, such that its logits spread by about 1: the
        answer is then the same for fresh weights, whose logits are next to equal, and for trained ones, and in any dtype."""
        router = self.routers[number]
        given = (
            [_as_float(argument) for argument in arguments],
            {name: _as_float(value) for name, value in named.items()},
        )
        copied = copy.deepcopy(router.module).float().eval()
        copied._forward_hooks.clear()
        generator = torch.Generator().manual_seed(0)
        weights = [weight for weight in copied.parameters() if weight.ndim == 2 and weight.is_floating_point()]
        for weight in weights:
            weight.copy_(torch.randn(weight.shape, generator=generator))
        spread = float(read_output(copied(*given[0], **given[1]), router.index, self.chosen)[0].std())
        for weight in weights:
            weight.div_(max(spread, 1e-6) ** (1 / len(weights)))
        read = read_output(copied(*given[0], **given[1]), router.index, self.chosen)
        self.scoring[number] = scoring_of(*read, has_bias(router.module))


def _as_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def has_bias(module: nn.Module) -> bool:
    """Whether the choice of experts is moved by a bias that gradients do not train."""
    return any(part in name for name in module.state_dict() for part in BIAS_NAMES)


def read_output(output: Any, index: int | None, chosen: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logits (N, E), experts chosen (N, C) int64, their weights (N, C) or None) of what a router returns.

    index: of the logits in the output; None: the first floating-point matrix. Where the router does not return its choice, it is
    the `chosen` experts with the highest logits.
    """
    values = [
        value for value in (output if isinstance(output, (tuple, list)) else (output,)) if isinstance(value, Tensor)
    ]
    whole = output if isinstance(output, (tuple, list)) else (output,)
    floats = [value for value in values if value.is_floating_point() and value.ndim >= 2]
    logits = floats[0] if index is None or index >= len(whole) else whole[index]
    logits_NE = logits.reshape(-1, logits.shape[-1])
    choices = [value for value in values if not value.is_floating_point() and value.ndim >= 2]
    if choices:
        chosen_NC = choices[0].reshape(logits_NE.shape[0], -1).long()
    else:
        chosen_NC = logits_NE.detach().topk(min(chosen, logits_NE.shape[1]), dim=-1).indices
    weights = [value for value in floats if value is not logits]
    for value in weights:
        if value.numel() == chosen_NC.numel():
            return logits_NE, chosen_NC, value.reshape(chosen_NC.shape)
        if value.shape == logits_NE.shape:
            return logits_NE, chosen_NC, value.gather(1, chosen_NC)
    return logits_NE, chosen_NC, None


def scoring_of(logits_NE: Tensor, chosen_NC: Tensor, weights_NC: Tensor | None, biased: bool) -> Scoring:
    """How a router makes probabilities, from one output: what it weighs two experts of a token by is compared with both ways.

    biased: decides where the weights say nothing (one expert for each token, or none of them known).
    """
    logits_NE = logits_NE.detach().double()
    if (logits_NE >= 0).all() and (logits_NE.sum(-1) - 1).abs().max() < 1e-2:
        return "probabilities"
    if weights_NC is None or chosen_NC.shape[1] < 2:
        if weights_NC is None or (weights_NC == 1).all():
            return "sigmoid" if biased else "softmax"
        errors = [
            float((scores_NE.gather(1, chosen_NC) - weights_NC.double()).abs().max())
            for scores_NE in (logits_NE.softmax(-1), logits_NE.sigmoid())
        ]
        return "sigmoid" if errors[1] < errors[0] else "softmax"
    ratios = weights_NC.detach().double().clamp_min(1e-30).log().diff(dim=1)
    errors = [
        float((log_scores_NE.gather(1, chosen_NC).diff(dim=1) - ratios).abs().mean())
        for log_scores_NE in (logits_NE, F.logsigmoid(logits_NE))
    ]
    if (
        min(errors) > FITTING_ERROR or min(errors) > max(errors) / 2
    ):  # weighed in another way, or the logits are too small to tell
        return "sigmoid" if biased else "softmax"
    return "sigmoid" if errors[1] < errors[0] else "softmax"


def probabilities(logits_NE: Tensor, scoring: Scoring) -> Tensor:
    """(N, E) fp32 that add up to 1 for every token. Sigmoid scores are divided by their sum (DeepSeek-V3, arXiv:2412.19437)."""
    if scoring == "softmax":
        return logits_NE.float().softmax(-1)
    scores_NE = logits_NE.float() if scoring == "probabilities" else logits_NE.float().sigmoid()
    return scores_NE / scores_NE.sum(-1, keepdim=True).clamp_min(1e-20)


def balancing_loss(probabilities_NE: Tensor, chosen_NC: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, counts) of one layer: the SUM over sequences of their tokens times E * sum_i f_i * P_i, () with gradients through P;
    and the assignments of each expert, (E,) without.

    mask_BT: (B, T) bool, False for padding. A sequence of padding only counts nothing.
    """
    (rows, _), num_experts = mask_BT.shape, probabilities_NE.shape[-1]
    mask_BT1 = mask_BT.unsqueeze(-1).float()
    chosen_BTC = chosen_NC.view(*mask_BT.shape, -1)
    counted = mask_BT1.expand(chosen_BTC.shape).reshape(rows, -1)
    counts_BE = counted.new_zeros(rows, num_experts).scatter_add_(1, chosen_BTC.reshape(rows, -1), counted)
    share_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp_min(1)  # f
    summed_BE = (probabilities_NE.view(*mask_BT.shape, -1) * mask_BT1).sum(1)  # tokens * P
    return num_experts * (share_BE * summed_BE).sum(), counts_BE.sum(0)
