"""The picture on the README's first screen, from a run of the demo: `python docs/demo_picture.py runs/demo`.

Left the training loss of each step and its moving mean, right the change of each held-out text against the model that the run
began with. Writes docs/images/demo.svg, which is readable on light and dark pages. Every point is a line of the run's
metrics.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from steep.core.files import write_text
from steep.reporting.curves import Curve, curve, smooth
from steep.reporting.palette import LIGHT, TEXT_STYLES, css_variables
from steep.reporting.plots import inline_svg, report_style
from steep.reporting.run_files import RunFiles, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "images" / "demo.svg"
LOSS_WINDOW = 9
FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif'
)


def main(run_directory: str) -> None:
    """Draw the run and say where the picture is. Raises SystemExit if the run scored its texts fewer than three times."""
    run = read_run(run_directory)
    if min((len(change(run, name).steps) for name in run.text_names()), default=0) < 3:
        raise SystemExit(f"{run_directory} scored its texts fewer than three times: set evaluate.every_steps")
    svg = inline_svg(draw(run), "demo", "What the demo did to the model", describe(run))
    style = f"<style>\n{css_variables()}:root {{ --sans: {FONT}; }}\n</style>\n"
    start = svg.index(">") + 1
    opening = svg[:start].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="300" ')
    PICTURE.parent.mkdir(exist_ok=True)
    write_text(PICTURE, opening + style + svg[start:])
    print(f"wrote {PICTURE}")


def change(run: RunFiles, text: str) -> Curve:
    """The change of one text's bits per byte against its first score, in percent, over the steps."""
    scores = curve((record for record in run.evaluate if record.get("text") == text), "bits_per_byte")
    return Curve(scores.steps, [100 * (value / scores.values[0] - 1) for value in scores.values])


def describe(run: RunFiles) -> str:
    """The picture in words, for those who do not see it."""
    ends = [f"{name} {change(run, name).values[-1]:+.1f} %" for name in run.text_names()]
    return f"Training loss of each step; change of bits per byte at the end: {', '.join(ends)}."


def draw(run: RunFiles) -> Figure:
    """Both panels, 900 x 300 pixels."""
    from matplotlib.figure import Figure

    with report_style():
        figure = Figure(figsize=(900 / 72, 300 / 72), layout="constrained")
        left, right = figure.subplots(1, 2)
        losses = curve(run.train, "loss")
        left.plot(losses.steps, losses.values, ".", color=LIGHT["train"], alpha=0.4)
        mean = smooth(losses, LOSS_WINDOW)
        left.plot(mean.steps, mean.values, color=LIGHT["train"])
        name_axes(left, f"training loss, nats per token; mean of {LOSS_WINDOW} steps")
        highest = max(change(run, name).values[-1] for name in run.text_names())
        for number, name in enumerate(run.text_names()):
            colour, dash, marker = TEXT_STYLES[number % len(TEXT_STYLES)]
            points = change(run, name)
            above = points.values[-1] == highest
            right.plot(points.steps, points.values, dash, marker=marker, color=LIGHT[colour])
            right.annotate(
                f"{name} {points.values[-1]:+.1f} %", (points.steps[-1], points.values[-1]), xytext=(-4, 6 if above else -6),
                textcoords="offset points", ha="right", va="bottom" if above else "top", color=LIGHT[colour],
            )  # fmt: skip
        right.axhline(0, color=LIGHT["faint"], linewidth=0.8)
        right.margins(y=0.2)
        name_axes(right, "held-out text, change of bits per byte in %; below 0 is better")
    return figure


def name_axes(axes: Axes, title: str) -> None:
    """Steps below, the title above the left corner."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.set_title(title, loc="left", fontsize=12, color=LIGHT["faint"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["runs/demo"])
