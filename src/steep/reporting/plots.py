"""The figures of a run, drawn by matplotlib without a display and without changing its global state; for the page as inline SVG,
which scales with it and takes its colours and font from it.

Sizes are in CSS pixels (72 per inch here, so that a font size of 12 is 12 pixels of the page).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steep.core.files import atomic_writer
from steep.core.html import escape
from steep.core.public import public
from steep.core.units import format_bytes, format_count
from steep.reporting.curves import Curve, curve, downsample, smooth, smoothing_window
from steep.reporting.palette import CSS_VARIABLES, LIGHT, PART_COLOURS, TEXT_STYLES
from steep.reporting.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits")

STYLE: dict[str, Any] = {
    "figure.dpi": 72, "savefig.dpi": 72, "font.size": 12, "font.family": "DejaVu Sans",
    "figure.facecolor": LIGHT["paper"], "axes.facecolor": "none", "axes.edgecolor": LIGHT["faint"],
    "axes.labelcolor": LIGHT["faint"], "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.8, "text.color": LIGHT["ink"], "text.parse_math": False, "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"], "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 12,
    "svg.fonttype": "none", "svg.hashsalt": "steep", "lines.linewidth": 1.8, "lines.markersize": 5, "path.simplify": False,
}  # fmt: skip


@contextmanager
def report_style() -> Iterator[None]:
    """The report's style, whatever the user's matplotlibrc says; for drawing, and for saving, which does the layout."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


@contextmanager
def drawing(width: int, height: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure of `width` x `height` pixels with one pair of axes."""
    from matplotlib.figure import Figure

    with report_style():
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        yield figure, figure.add_subplot()


def loss_plot(run: RunFiles, width: int = 900, height: int = 380, max_points: int = 2000, title: str = "") -> Figure:
    """Training loss, raw and smoothed, and the loss on each held-out text, all in nats per token. title: for a picture alone."""
    with drawing(width, height) as (figure, axes):
        name_figure(figure, title)
        _draw_raw_and_smooth(axes, curve(run.train, "loss"), "training", max_points)
        for number, name in enumerate(run.text_names()):
            colour, dash, marker = TEXT_STYLES[number % len(TEXT_STYLES)]
            scores = downsample(held_out_curve(run, name), max_points // 4)
            every = max(1, len(scores.steps) // 24)  # a marker on each of 500 points would hide the line
            axes.plot(scores.steps, scores.values, dash, marker=marker, markevery=every, color=LIGHT[colour],
                      label=f"held-out {name}")  # fmt: skip
        _label(axes, "step", "nats per token")
        if not axes.lines:
            axes.text(0.5, 0.5, "no losses yet", transform=axes.transAxes, ha="center", color=LIGHT["faint"])
        elif width < 600 or title:
            figure.legend(loc="outside lower left", ncols=1 if width < 600 else 6)
        else:
            figure.legend(loc="outside upper left", ncols=6)
    return figure


def name_figure(figure: Figure, title: str) -> None:
    """Write what the picture is of at its top left; nothing for an empty title."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=14)


def held_out_curve(run: RunFiles, text: str) -> Curve:
    """Nats per token of one held-out text over the steps."""
    return curve((record for record in run.evaluate if str(record.get("text")) == text), "nats_per_token")


def _draw_raw_and_smooth(axes: Axes, points: Curve, label: str, max_points: int) -> None:
    if not points:
        return
    raw, window = downsample(points, max_points), smoothing_window(len(points.steps))
    lone = {"marker": "o"} if len(points.steps) == 1 else {}
    axes.plot(raw.steps, raw.values, color=LIGHT["raw"], linewidth=1.0, label=label, **lone)  # type: ignore[arg-type]
    if len(points.steps) > window:
        soft = downsample(smooth(points, window), max_points)
        axes.plot(soft.steps, soft.values, color=LIGHT["train"], label=f"mean of {window:,} steps")


def metric_plot(run: RunFiles, name: str, label: str, width: int = 440, height: int = 240) -> Figure:
    """One metric of the training lines over the steps, on an axis from zero; noisy ones also smoothed."""
    points = curve(run.train, name)
    with drawing(width, height) as (figure, axes):
        if name == "learning_rate":
            line = downsample(points)
            axes.plot(line.steps, line.values, color=LIGHT["train"])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        else:
            _draw_raw_and_smooth(axes, points, "each step", 1000)
            axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
        axes.set_ylim(bottom=0)
        _label(axes, "step", label)
    return figure


def _label(axes: Axes, x: str, y: str) -> None:
    """Name the axes: `x` below, `y` horizontally above the top left corner."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(x)
    axes.set_title(y, loc="left", fontsize=12, color=LIGHT["faint"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))


def memory_parts(memory: Mapping[str, float]) -> list[tuple[str, float]]:
    """The parts of a memory plan in the order of the bar, without the total and parts of no size."""
    names = [*MEMORY_PARTS, *(name for name in memory if name not in MEMORY_PARTS and name != "total")]
    return [(name, memory[name]) for name in names if isinstance(memory.get(name), (int, float)) and memory[name] > 0]


@public
def memory_plot(
    parts: Mapping[str, float],
    measured_bytes: float | None = None,
    width: int = 900,
    labels: tuple[str, str] = ("predicted", "measured"),
) -> Figure:
    """Memory as a bar of its parts, and below it a bar of the measured total.

    parts: bytes by name (weights, gradients, optimizer, activations, logits; any others follow; `total` is the sum).
    measured_bytes: the second bar, if given. width: of the figure in pixels. labels: of the two bars.
    """
    listed = memory_parts(parts)
    narrow = width < 600
    height = 110 + (40 if measured_bytes else 0) + (20 * len(listed) if narrow else 24)
    with drawing(width, height) as (figure, axes):
        left = 0.0
        for number, (name, size) in enumerate(listed):
            colour = LIGHT[PART_COLOURS[number % len(PART_COLOURS)]]
            axes.barh(0, size, left=left, height=0.6, color=colour, edgecolor=LIGHT["paper"], label=name, linewidth=2)
            left += size
        _name_bar(axes, 0, left)
        if measured_bytes:
            axes.barh(1, measured_bytes, height=0.6, color="none", edgecolor=LIGHT["ink"], linewidth=1.5)
            _name_bar(axes, 1, measured_bytes)
        _style_bars(axes, labels if measured_bytes else labels[:1], max(left, measured_bytes or 0))
        if listed:
            figure.legend(loc="outside lower left", ncols=1 if narrow else 6)
    return figure


def _name_bar(axes: Axes, row: int, size: float) -> None:
    """Write the size of a bar to its right."""
    axes.annotate(format_bytes(size), (size, row), xytext=(7, 0), textcoords="offset points", va="center")


def _style_bars(axes: Axes, names: Sequence[str], longest: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, (longest or 1) * 1.18)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.xaxis.set_visible(False)
    axes.grid(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_visible(False)


def inline_svg(figure: Figure, name: str, title: str, description: str, css_class: str = "") -> str:
    """The figure as one <svg> element without width and height.

    name: unique on the page; the prefix of every id, because several figures share one page.
    title, description: what a screen reader says.
    Colours of the light palette become CSS variables; fonts become the page's.
    """
    buffer = io.StringIO()
    with report_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    view_box = re.search(r'viewBox="([^"]+)"', text)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = text[text.index(">") + 1 :]
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)
    for colour, variable in CSS_VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", body)  # matplotlib 3.9 and later; before that:
    body = re.sub(r"font: (?:[a-z]+ )*?((?:\d{3} )?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)
    body = re.sub(r"\s*<!--.*?-->", "", body, flags=re.DOTALL)
    return (
        f'<svg class="{css_class}" viewBox="{view_box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n<desc id="{name}-desc">{escape(description)}</desc>\n'
        f"{body}"
    )


def png_of(figure: Figure) -> bytes:
    """The figure as a PNG of twice its size in pixels."""
    buffer = io.BytesIO()
    with report_style():
        figure.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
    return buffer.getvalue()


def write_training_loss(run_directory: str | Path) -> Path:
    """Draw the loss curves of a run into training_loss.png (1,800 x 800 pixels) and return its path."""
    path = Path(run_directory) / "training_loss.png"
    run = read_run(run_directory)
    figure = loss_plot(run, width=900, height=400, title=f"{run.name}: loss in training and on held-out text")
    with atomic_writer(path) as file:
        file.write(png_of(figure))
    return path
