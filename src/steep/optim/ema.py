"""An exponential moving average of the weights, kept in the optimizer's state, so that it is saved and resumed with it.

average <- decay * average + (1 - decay) * weights. Source: Morales-Brotons et al. 2024 (arXiv:2411.18704). Main choice: fp32,
after every update that is applied, starting at the weights after the first one. Weakness: 4 bytes per trained parameter on the
device.
"""

from __future__ import annotations

import torch

KEY = "ema"


@torch.no_grad()
def update_ema(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Update the average of every trained parameter, or start it where there is none."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state and KEY in state:
                state[KEY].lerp_(parameter.detach().float(), 1 - decay)
            elif state:  # an optimizer creates its own state at the first update, if it finds none
                state[KEY] = parameter.detach().float().clone()
