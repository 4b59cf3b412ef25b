"""Whether the balancing loss of a mixture of experts is added, and with which coefficient; decided and said before training.

In: a model with its loss, and `model.balance_loss`. Out: the same, whose training forward reports what its routers do.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from steep.core.errors import ConfigError
from steep.core.say import Say
from steep.models.balance import RoutingRecorder, has_bias
from steep.models.layers import compute_device, evaluating, text_config
from steep.models.lm_loss import LMLoss
from steep.models.mixture import balance_coefficient, find_experts
from steep.models.probes import check_batch

NOT_IN_LOSS = "the reported loss stays the cross-entropy"


def prepare_balance(lm_loss: LMLoss, say: Say, wished: float | None, vocab_size: int | None = None) -> None:
    """Let `lm_loss` report its routers and add the balancing loss, where the model has experts; does nothing for other models.

    wished: the coefficient, None for the model's own. vocab_size: ids that one forward pass over a few tokens may use. Call it
    before layers are compiled. Raises ConfigError for a coefficient that a model cannot use.
    """
    model = lm_loss.model
    recorder, experts = RoutingRecorder(model), find_experts(model)
    outputs: dict[int, list[object]] = {}
    if recorder.routers:
        one_dtype = len({tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}) == 1
        exact = torch.autocast(compute_device(model).type, enabled=False) if one_dtype else nullcontext()
        with evaluating(model), exact, recorder.recording(probing=True) as outputs:
            run = lm_loss.hidden_states if lm_loss.has_head else lm_loss.own_logits
            run(check_batch(model, vocab_size))
    if not outputs:
        if wished:
            raise ConfigError(f"model.balance_loss: {type(model).__name__} has no router of experts; remove it")
        if experts:
            say(
                f"experts: no router of {type(model).__name__} was found: no balancing loss, and no load in the metrics"
            )
        return
    key, own = balance_coefficient(model) or (None, 0.0)
    coefficient = own if wished is None else wished
    trained = any(tensor.requires_grad for router in recorder.routers for tensor in router.module.parameters())
    lm_loss.watch_routing(recorder, coefficient if trained else 0.0)
    counts = sorted({recorder.num_experts(number, calls[-1]) for number, calls in outputs.items()})
    what = (
        f"experts: {' or '.join(map(str, counts))} in each of {len(outputs)} layers, {recorder.chosen} for each token"
    )
    if not trained and coefficient:
        say(f"{what}; no balancing loss, because the routers are not trained")
    elif coefficient:
        source = "model.balance_loss" if wished is not None else f"{key} of the model"
        say(
            f"{what}; balancing loss: {coefficient:g} ({source}) times its sum over layers is added, taken over each sequence "
            f"without padding; {NOT_IN_LOSS}"
        )
    else:
        say(f"{what}; no balancing loss, because {_why_not(lm_loss, key, wished)}")


def _why_not(lm_loss: LMLoss, key: str | None, wished: float | None) -> str:
    if wished == 0 or key is not None:
        return f"{'model.balance_loss' if wished == 0 else key} is 0"
    family = getattr(text_config(lm_loss.model), "model_type", type(lm_loss.model).__name__)
    advice = "; model.balance_loss: 0.001 adds one"
    if has_bias(lm_loss.model):
        return (
            f"{family} balances its experts by a bias on their choice, which gradients do not train and this run leaves as it "
            f"is{advice}"
        )
    return f"the configuration of {family} gives no coefficient for one{advice}"
