"""A matplotlib figure as inline SVG: it scales with the HTML page and takes its colours and font from it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from steep.reporting.html import escape
from steep.reporting.palette import CSS_VARIABLES
from steep.reporting.plots import report_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    return (
        f'<svg class="{css_class}" viewBox="{view_box[1]}" role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n<desc id="{name}-desc">{escape(description)}</desc>\n'
        f"{_with_page_style(_with_own_ids(body, name))}"
    )


def _with_own_ids(body: str, name: str) -> str:
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', body)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", body)


def _with_page_style(body: str) -> str:
    for colour, variable in CSS_VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", body)  # matplotlib 3.9 and later; before that:
    body = re.sub(r"font: (?:[a-z]+ )*?((?:\d{3} )?[\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)
    return re.sub(r"\s*<!--.*?-->", "", body, flags=re.DOTALL)
