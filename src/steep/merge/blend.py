"""`steep blend`: models between the base and the trained one, scored, and the best one within the forgetting cap.

Source: WiSE-FT (arXiv 2109.01903). Weakness: the blend is selected on the held-out texts, so the score of the chosen one is
slightly too good; score it again on other text.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from steep.core.errors import ConfigError
from steep.core.public import public
from steep.core.say import Say, tell
from steep.core.table import text_table
from steep.evaluation.config import DEFAULT_CAP_RATIO
from steep.evaluation.evaluate_model import Evaluation, evaluate
from steep.evaluation.forgetting import forgetting_report, role_of
from steep.evaluation.model_reference import Reference, base_model_reference, config_of_run, run_of
from steep.merge.scored import NOTHING_KNOWN, KnownScores, known_scores
from steep.merge.verified import write_verified
from steep.merge.weights import FolderWeights, Weights, combine, open_weights, require_free, write_model
from steep.reporting.palette import LIGHT, TEXT_STYLES
from steep.reporting.plots import drawing, name_figure, report_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class BlendPoint:
    """One blend: alpha 0 is the base, 1 the trained model; bits per byte by text."""

    alpha: float
    bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class BlendResult:
    """The model written, its alpha, and every point of the sweep."""

    path: Path
    alpha: float
    points: list[BlendPoint]
    reason: str

    def __str__(self) -> str:
        names = list(self.points[0].bits_per_byte)
        rows = [["alpha", *(f"{name} bits/byte" for name in names), ""]]
        for point in self.points:
            mark = "chosen" if point.alpha == self.alpha else ""
            rows.append([f"{point.alpha:g}", *(f"{point.bits_per_byte[name]:.4f}" for name in names), mark])
        return "\n".join([*text_table(rows, left=0), self.reason, f"verified by transformers: {self.path}"])


@public
def blend(
    model: Reference,
    texts: Mapping[str, str] | Sequence[str] | None = None,
    *,
    base: Reference | None = None,
    alphas: Sequence[float] | None = None,
    cap: float | None = None,
    tokens: int | str | None = None,
    out: str | os.PathLike[str] | None = None,
    say: Say = tell,
) -> BlendResult:
    """Weights between the base and the trained model, each blend scored, the best one under the cap written and verified.

    model: the trained one. texts, tokens: as for `steep.evaluate`; default the run's held-out texts. base: default, what the
    run started from. alphas: 0 is the base, 1 the trained model, both bit for bit; default 0, 0.25, 0.5, 0.75, 1. cap: what each
    general text may lose, as a share of the base's bits per byte; default the run's evaluate.forgetting_cap. Roles are those of
    the forgetting report. out: default `<run>/blend/best`. say: called with each remark. Raises ModelError for models that differ
    in names or shapes.
    """
    trained = os.fspath(model)
    alphas = ALPHAS if alphas is None else alphas
    run = run_of(trained)
    if run is None and (out is None or not texts):
        raise ConfigError(f"{trained} is not in a run directory: name --base, --out and at least one text")
    wanted = sorted({float(alpha) for alpha in alphas} | {0.0})
    if any(not 0 <= alpha <= 1 for alpha in wanted) or len(wanted) < 2:
        raise ConfigError(f"alphas {', '.join(map(str, alphas))}: give numbers from 0 (the base) to 1 (the trained)")
    folder = require_free(out if out is not None else f"{run}/blend/best")
    end = open_weights(trained, say)
    if not isinstance(end, FolderWeights):
        raise ConfigError(
            f"{trained}: config and tokenizer are taken from the trained model, so it must be a run or a folder"
        )
    if base is not None:
        start = open_weights(os.fspath(base), say)
    else:
        origin = base_model_reference(trained)
        start = open_weights(origin.reference, say, getattr(origin.model, "revision", None))
    config = None if run is None else config_of_run(run)
    known = NOTHING_KNOWN
    if run is not None and config is not None and not texts and base is None:
        known = known_scores(run, config, trained, tokens)
    precision = "auto" if config is None else config.train.precision  # that of the run, whose scores these are beside
    points, roles = _points(wanted, known, partial(_score, start, end, run, texts, tokens, precision, say), say)
    if cap is None:
        cap = config.evaluate.forgetting_cap if config else DEFAULT_CAP_RATIO
    chosen, reason = choose(points, cap, roles)
    tensors = combine([start, end], [1 - chosen.alpha, chosen.alpha])
    made = [f"{1 - chosen.alpha:g} x `{start.folder}`", f"{chosen.alpha:g} x `{trained}`", reason]
    capped = [text for text in chosen.bits_per_byte if role_of(text, roles.get(text))[0] == "general"]
    name = Path(trained).name if run is None else run.name
    picture = partial(blend_plot, points, chosen, name, capped, cap)
    write_verified(tensors, end.folder, folder, made, finish=partial(_write_picture, picture, say))
    return BlendResult(folder, chosen.alpha, points, reason)


def _points(
    alphas: Sequence[float], known: KnownScores, score: Callable[[float], Evaluation], say: Say
) -> tuple[list[BlendPoint], dict[str, str | None]]:
    """Every blend with its score, and the roles of the texts; ends that the run has scored are not scored again."""
    found = {alpha: score(alpha) for alpha in alphas if known.bits_per_byte(alpha) is None}
    if not all(known.are_of(evaluation.scores) for evaluation in found.values()):
        say("the held-out texts have changed since the run scored them, so its scores are not used")
        found |= {alpha: score(alpha) for alpha in alphas if alpha not in found}
    taken = {alpha: bits for alpha in alphas if alpha not in found and (bits := known.bits_per_byte(alpha)) is not None}
    if taken:
        say(f"alpha {' and '.join(f'{alpha:g}' for alpha in taken)}: scores taken from the run")
    points = [BlendPoint(alpha, taken[alpha] if alpha in taken else _bits(found[alpha])) for alpha in alphas]
    return points, next((evaluation.roles for evaluation in found.values()), known.roles)


def _bits(evaluation: Evaluation) -> dict[str, float]:
    """Bits per byte by text. Raises ConfigError where they are not known."""
    bits = {score.text: score.bits_per_byte for score in evaluation.scores}
    known = {name: value for name, value in bits.items() if value is not None}
    if not bits or known != bits:
        raise ConfigError(f"choosing a blend needs bits per byte, and the texts give {bits}; name texts to score")
    return known


def _score(
    start: Weights,
    end: FolderWeights,
    run: Path | None,
    texts: Mapping[str, str] | Sequence[str] | None,
    tokens: int | str | None,
    precision: str,
    say: Say,
    alpha: float,
) -> Evaluation:
    """The scores of one blend: written inside the run, whose texts and tokenizer policy apply, scored, removed."""
    if run is not None:
        (run / "blend").mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=run / "blend" if run is not None else None))
    try:
        tensors = combine([start, end], [1 - alpha, alpha])
        model = write_model(tensors, end.folder, scratch / "model", "")
        del tensors
        return evaluate(str(model), texts, tokens=tokens, precision=precision, say=say)
    finally:
        shutil.rmtree(scratch)


def choose(
    points: Sequence[BlendPoint], cap: float, roles: Mapping[str, str | None] | None = None
) -> tuple[BlendPoint, str]:
    """The point with the largest gain on the domain texts among those under the forgetting cap, and the reason.

    points: must include alpha 0. roles: as for `forgetting_report`. Raises ConfigError if there is no domain text. Without a
    general text there is no cap, and the reason tells.
    """
    base = next(point for point in points if point.alpha == 0)
    reports = []
    for point in points:
        scores = {
            text: {"before": {"bits_per_byte": base.bits_per_byte[text]}, "after": {"bits_per_byte": bits}}
            for text, bits in point.bits_per_byte.items()
        }
        reports.append((forgetting_report(scores, roles=roles, cap_ratio=cap), point))
    first = reports[0][0]
    names = ", ".join(base.bits_per_byte)
    if first.gain is None:
        raise ConfigError(f"every text is general ({names}); name a domain text too, as in domain=PATH")
    best = max((r for r in reports if r[0].verdict != "forgot"), key=lambda r: r[0].gain or 0.0)[1]
    general = ", ".join(change.text for change in first.of("general"))
    if not general:
        return best, f"no text is general ({names} are domain texts), so forgetting is not capped: best of all alphas"
    return best, f"alpha {best.alpha:g}: best domain score with {general} at most {cap:.1%} worse than the base"


def _write_picture(draw: Callable[[], Figure], say: Say, folder: Path) -> None:
    """blend.svg, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        say("no plot: matplotlib is not installed")
        return
    figure = draw()
    with report_style():
        figure.savefig(folder / "blend.svg", format="svg", metadata={"Date": None})


def blend_plot(
    points: Sequence[BlendPoint], chosen: BlendPoint, name: str, capped: Sequence[str], cap: float
) -> Figure:
    """Bits per byte of each text over alpha, and what the general ones (`capped`) may have at most. name: of the run or model."""
    base = next(point for point in points if point.alpha == 0)
    with drawing(760, 420) as (figure, axes):
        name_figure(figure, f"{name}: between the base and the trained model")
        for number, text in enumerate(chosen.bits_per_byte):
            colour, dash, marker = TEXT_STYLES[number % len(TEXT_STYLES)]
            values = [point.bits_per_byte[text] for point in points]
            axes.plot([p.alpha for p in points], values, dash, marker=marker, color=LIGHT[colour], label=text)
            if text in capped:
                limit = (1 + cap) * base.bits_per_byte[text]
                label = f"{text}, cap: base + {100 * cap:.3g} %"
                axes.axhline(limit, color=LIGHT[colour], linewidth=1.2, linestyle=":", label=label)
        axes.axvline(chosen.alpha, color=LIGHT["faint"], linewidth=0.8, label=f"chosen: alpha {chosen.alpha:g}")
        axes.set_xticks([point.alpha for point in points], [f"{point.alpha:g}" for point in points])
        axes.set_xlabel("alpha (0: base, 1: trained)")
        axes.set_title("bits per byte", loc="left", fontsize=12, color=LIGHT["faint"])
        figure.legend(loc="outside lower left", ncols=3)
    return figure
