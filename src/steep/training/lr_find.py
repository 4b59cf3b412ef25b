"""`steep lr-find`: which learning rate to use, from short runs that all start at the base and see the same sequences.

In: a RunConfig. Out: the held-out loss after a few steps at each rate, a proposal and a plot. Source: sweeps of short runs as in
Smith 2017 (arXiv:1506.01186), but each rate starts again from the base: in a single run with rising rates, the effect of one rate
is attributed to the next. Main choice: the proposal is the smallest of the rates whose gain is close to the best, because short
runs favour high rates and high rates forget more. Weakness: for a run that is many times longer the proposal is a little high.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.config.load import ConfigLike, as_config
from steep.config.run import RunConfig
from steep.core import targets
from steep.core.errors import ConfigError
from steep.core.files import atomic_writer, write_json
from steep.core.html import picture, preformatted
from steep.core.public import Readable, public
from steep.core.say import Say, tell
from steep.core.section import Target
from steep.core.table import text_table
from steep.evaluation.forgetting import role_of
from steep.optim.config import OptimizerConfig, ScheduleConfig
from steep.optim.schedule import multiplier
from steep.reporting.palette import LIGHT, TEXT_STYLES
from steep.reporting.plots import drawing, name_figure, png_of
from steep.runtime.ranks import Ranks, join_ranks
from steep.runtime.seed import seed_everything
from steep.training.assemble import Job, assemble, open_loader
from steep.training.validation import score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATIOS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Rates tried, over the configured one."""

EMBEDDING_RATIOS = (0.03, 0.1, 0.3, 1.0)
"""Rates of the embeddings tried, over the main one that was found."""

NEARLY_ALL = 0.9
"""The share of the best gain that is enough."""

SCHEDULE = ScheduleConfig(name="constant", warmup_ratio=0.2)
"""Of each trial."""

DIVERGED_RATIO = 1.5
"""A trial ends when its training loss is this many times that of its first step."""


MOST_LEVEL_LABELS = 8
"""Labels of rates that stand side by side; more are turned."""


@dataclass(frozen=True)
class Trial:
    """One short run."""

    learning_rate: float
    embedding_learning_rate: float | None
    """None where the embeddings have no rate of their own."""
    training_losses: list[float]
    """Nats per token of each step; shorter than the others where the loss diverged."""
    losses: dict[str, float]
    """Nats per token of each held-out text at the end; empty where the loss diverged."""

    @property
    def diverged(self) -> bool:
        """Whether the loss diverged."""
        return not self.losses or any(not math.isfinite(value) for value in self.losses.values())


@dataclass(frozen=True, repr=False)
class LearningRates(Readable):
    """What a sweep found."""

    learning_rate: float
    embedding_learning_rate: float | None
    reason: str
    base: dict[str, float]
    """Nats per token of each held-out text before training."""
    trials: list[Trial]
    domain: list[str]
    """The texts that are judged by; their mean counts."""
    steps: int
    path: Path

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "path": str(self.path)}

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        name = self.path.parent.parent.name
        return preformatted(self.to_text()) + picture(png_of(rates_plot(self, name)), "loss over learning rates")

    def to_text(self) -> str:
        names = list(self.base)
        rows = [["learning rate", "embeddings", *names]]
        rows.append(["base", "", *(f"{self.base[name]:.4f}" for name in names)])
        for trial in self.trials:
            embeddings = "" if trial.embedding_learning_rate is None else f"{trial.embedding_learning_rate:.2g}"
            values = ["diverged"] if trial.diverged else [f"{trial.losses[name]:.4f}" for name in names]
            rows.append([f"{trial.learning_rate:.2g}", embeddings, *values])
        if all(trial.embedding_learning_rate is None for trial in self.trials):
            rows = [[rate, *values] for rate, _, *values in rows]
        keys = f"--optimizer.learning_rate {self.learning_rate:.2g}"
        if self.embedding_learning_rate is not None:
            keys += f" --optimizer.embedding_learning_rate {self.embedding_learning_rate:.2g}"
        return "\n".join(
            [f"nats per token after {self.steps} steps", *text_table(rows, left=0), self.reason, f"proposed: {keys}"]
        )


@public
def lr_find(
    config: ConfigLike,
    *,
    rates: Sequence[float] | None = None,
    steps: int = 20,
    allow_code: bool = True,
    say: Say = tell,
) -> LearningRates:
    """Short runs from the base at several learning rates, each scored on the held-out texts, and a proposal.

    config: a RunConfig, its values as a mapping, or the path of a YAML file. rates: default a tenth to ten times the configured
    one. steps: of each run, of the configured batch size. allow_code: whether `_target_` may run code outside steep, torch and
    transformers. say: called with each line of progress. Writes lr_find.json and lr_find.png into `<run directory>/lr_find/`, and
    nothing else. Raises ConfigError without held-out text, for an optimizer of the user's own, or where no rate is better than
    the base.
    """
    config = as_config(config)
    targets.check_run(config, say, allow_code)
    optimizer = config.optimizer
    if isinstance(optimizer, Target):
        raise ConfigError(
            "lr-find varies optimizer.learning_rate; an optimizer given as _target_ has no learning rate that lr-find can set"
        )
    if not config.data.validation:
        raise ConfigError("lr-find judges by held-out text: give data.validation, such as {own: {share: 0.05}}")
    wanted = sorted(set(rates or [ratio * optimizer.learning_rate for ratio in RATIOS]))
    if len(wanted) < 2 or any(not (rate > 0 and math.isfinite(rate)) for rate in wanted):
        raise ConfigError(f"lr-find: rates {', '.join(f'{rate:g}' for rate in wanted)}: give at least two, all above 0")
    sweep = Sweep(shortened(config, steps), say, join_ranks())
    trials = [sweep.trial(with_rate(optimizer, rate)) for rate in wanted]
    best = choose(sweep.base, trials, sweep.domain)
    reason = explain(sweep.base, trials, best, sweep.domain)
    if sweep.has_embedding_group:
        others = [
            sweep.trial(with_rate(optimizer, best.learning_rate, ratio * best.learning_rate))
            for ratio in EMBEDDING_RATIOS
        ]
        trials += others
        best = choose(sweep.base, others, sweep.domain)
    folder = Path(config.run.directory).expanduser() / config.run.name / "lr_find"
    folder.mkdir(parents=True, exist_ok=True)
    rates_found = (best.learning_rate, best.embedding_learning_rate)
    found = LearningRates(*rates_found, reason, sweep.base, trials, sweep.domain, steps, folder / "lr_find.json")
    write_json(found.path, found.to_mapping())
    with atomic_writer(folder / "lr_find.png") as file:
        file.write(png_of(rates_plot(found, config.run.name)))
    return found


def shortened(config: RunConfig, steps: int) -> RunConfig:
    """The same run, `steps` long."""
    train = config.train.model_copy(update={"steps": steps, "epochs": None, "tokens": None, "ema_decay": None})
    return config.model_copy(update={"train": train})


def with_rate(optimizer: OptimizerConfig, rate: float, embedding_rate: float | None = None) -> OptimizerConfig:
    """The optimizer at another rate; its embeddings at theirs, by default in the same proportion as before."""
    configured = optimizer.embedding_learning_rate
    if embedding_rate is None and configured is not None:
        embedding_rate = configured / optimizer.learning_rate * rate
    return optimizer.model_copy(update={"learning_rate": rate, "embedding_learning_rate": embedding_rate})


class Sweep:
    """A model that is put back to its beginning before each trial."""

    def __init__(self, config: RunConfig, say: Say, ranks: Ranks):
        self.say, self.ranks = say, ranks
        self.job: Job = assemble(config, say, ranks=ranks)
        self.config = self.job.config
        self._beginning = self.job.engine.trained_weights()
        self.has_embedding_group = "embeddings" in self.job.engine.peak_rates
        texts = self.job.data.held_out_texts
        domain = [text.name for text in texts if role_of(text.name, text.role)[0] == "domain"]
        self.domain = domain or [text.name for text in texts]
        self.base = self._scores()
        say("base: " + ", ".join(f"{name} {loss:.4f}" for name, loss in self.base.items()) + " nats per token")

    def trial(self, optimizer: OptimizerConfig) -> Trial:
        """One short run from the beginning: a fifth of the steps warms up, then the rate stays."""
        engine, sizes = self.job.engine, self.job.sizes
        engine.restart(self._beginning, optimizer)
        seed_everything(self.config.run.seed)
        losses: list[float] = []
        loader = open_loader(self.config, self.job, 0, self.ranks)
        for number, step in enumerate(loader):
            losses.append(engine.train_step(step, multiplier(number, sizes.steps, SCHEDULE)).numbers().loss)
            if not math.isfinite(losses[-1]) or losses[-1] > DIVERGED_RATIO * losses[0]:
                break
        complete = len(losses) == sizes.steps and math.isfinite(losses[-1])
        trial = Trial(
            optimizer.learning_rate, engine.peak_rates.get("embeddings"), losses, self._scores() if complete else {}
        )
        scores = ", ".join(f"{name} {loss:.4f}" for name, loss in trial.losses.items())
        embeddings = trial.embedding_learning_rate
        rates = f"{trial.learning_rate:.2g}" + (f", embeddings {embeddings:.2g}" if embeddings else "")
        self.say(f"learning rate {rates}: {scores or f'diverged at step {len(losses) - 1}'}")
        return trial

    def _scores(self) -> dict[str, float]:
        texts = self.job.data.held_out_texts
        return {text.name: score(self.config, self.job, text).nats_per_token for text in texts}


def choose(base: dict[str, float], trials: Sequence[Trial], domain: Sequence[str]) -> Trial:
    """The smallest rates among those that gain nearly as much on the domain texts as the best. Raises ConfigError."""
    gains = [(_gain(base, trial, domain), trial) for trial in trials]
    most = max(gain for gain, _ in gains)
    if most <= 0:
        raise ConfigError(
            "lr-find: no rate made the domain text better than the base. Try lower rates (--rates), more --steps, or look at "
            "whether the held-out text resembles the training text."
        )
    enough = [trial for gain, trial in gains if gain >= NEARLY_ALL * most]
    return min(enough, key=lambda trial: (trial.learning_rate, trial.embedding_learning_rate or 0.0))


def _gain(base: dict[str, float], trial: Trial, domain: Sequence[str]) -> float:
    if trial.diverged:
        return -math.inf
    return sum(base[name] - trial.losses[name] for name in domain) / len(domain)


def explain(base: dict[str, float], trials: Sequence[Trial], best: Trial, domain: Sequence[str]) -> str:
    """Why this rate, and what is doubtful about it."""
    ordered = sorted(trials, key=lambda trial: trial.learning_rate)
    top = max(ordered, key=lambda trial: _gain(base, trial, domain))
    share = _gain(base, best, domain) / _gain(base, top, domain)
    reason = (
        f"{best.learning_rate:.2g} is the smallest rate with at least {NEARLY_ALL:.0%} of the best gain "
        f"({share:.0%} of the gain at {top.learning_rate:.2g})"
    )
    if best is ordered[-1]:
        reason += "; it is the highest that was tried: try higher ones too"
    elif best is ordered[0]:
        reason += "; it is the lowest that was tried: try lower ones too"
    return reason


def rates_plot(found: LearningRates, name: str) -> Figure:
    """The loss on each held-out text over the rates of the main sweep, beside that of the base. name: of the run."""
    main = {trial.learning_rate: trial for trial in reversed(found.trials)}  # the first of each rate: the main sweep
    with drawing(760, 420) as (figure, axes):
        name_figure(figure, f"{name}: learning rates after {found.steps} steps")
        for number, (name, base) in enumerate(found.base.items()):
            colour, dash, marker = TEXT_STYLES[number % len(TEXT_STYLES)]
            good = sorted((t.learning_rate, t.losses[name]) for t in main.values() if not t.diverged)
            axes.plot(*zip(*good, strict=True), dash, marker=marker, color=LIGHT[colour], label=name)
            axes.axhline(base, color=LIGHT[colour], linewidth=1.2, linestyle=":", label=f"{name}, base")
        axes.axvline(found.learning_rate, color=LIGHT["faint"], linewidth=0.8, label="proposed")
        axes.set_xscale("log")
        rates = sorted(main)
        labels = [f"{rate:.2g}" + ("\ndiverged" if main[rate].diverged else "") for rate in rates]
        axes.set_xticks(rates, labels, rotation=0 if len(rates) <= MOST_LEVEL_LABELS else 45)
        axes.minorticks_off()  # the rates tried are the only ones of interest
        axes.set_xlim(rates[0] / 1.3, rates[-1] * 1.3)
        axes.set_xlabel("learning rate")
        axes.set_title("nats per token", loc="left", fontsize=12, color=LIGHT["faint"])
        figure.legend(loc="outside lower left", ncols=4)
    return figure
