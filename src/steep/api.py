"""steep for notebooks: what the commands do, as functions that take plain values and return plain objects.

Available as `steep.prepare`, `steep.plan`, `steep.train`, `steep.evaluate`, `steep.generate` and `steep.export`.
Everything heavy is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from steep.config.load import ConfigLike
    from steep.training.finish import TrainResult
    from steep.training.lr_find import LearningRates


def lr_find(
    config: ConfigLike, *, rates: Optional[Sequence[float]] = None, steps: int = 20, allow_code: bool = True
) -> LearningRates:
    """Short runs from the base at several learning rates, each scored on the held-out texts, and a proposal.

    rates: default a tenth to ten times the configured one. steps: of each run, of the configured batch size. Writes lr_find.json
    and lr_find.png into `<run directory>/lr_find/`. Raises ConfigError without held-out text, or where no rate helps.
    """
    from steep.config.load import as_config

    checked = as_config(config)

    from steep.runtime.tuning import tune_process

    tune_process()

    from steep.core.say import tell
    from steep.training.lr_find import find_learning_rate

    return find_learning_rate(checked, rates=rates, steps=steps, say=tell, allow_code=allow_code)


def train(
    config: ConfigLike, *, resume: Optional[bool] = None, accept_data_change: bool = False, allow_code: bool = True
) -> TrainResult:
    """Train as configured; continues from the run's newest checkpoint if it has one.

    resume: True demands a checkpoint, False refuses one. accept_data_change: continue with other data than was trained on, from
    its beginning, and record it. allow_code: whether `_target_` may run code outside steep, torch and
    transformers. Raises a SteepError.
    """
    from steep.config.load import as_config

    checked = as_config(config)

    from steep.runtime.tuning import tune_process

    tune_process()

    from steep.training.loop import train as run

    return run(checked, resume=resume, accept_data_change=accept_data_change, allow_code=allow_code)
