"""The colours of the report in its light and dark scheme. Plots are drawn in the light one.

Every light colour is unique, so that the page's CSS variables can replace the colours of a drawn figure. Contrast with the
paper is at least 4.5 for text and 3 for lines, in both schemes (WCAG 2.1, 1.4.3 and 1.4.11), except for raw data lines and grid
lines, which show nothing that another line does not.
"""

from __future__ import annotations

LIGHT = {
    "paper": "#fdfcf9",
    "ink": "#22252a",
    "faint": "#62676f",
    "rule": "#dfdcd4",
    "raw": "#b9c2cf",
    "train": "#4a5d7c",
    "first": "#0d6e6a",
    "second": "#b0560f",
    "third": "#7a4f9a",
    "fourth": "#8a6d00",
}

DARK = {
    "paper": "#17191c",
    "ink": "#e8e6e1",
    "faint": "#a3a7ad",
    "rule": "#363a40",
    "raw": "#4d5968",
    "train": "#a7bad6",
    "first": "#58c4bb",
    "second": "#eba15a",
    "third": "#c39be0",
    "fourth": "#d8b84a",
}

CSS_VARIABLES = {colour: f"--{name}" for name, colour in LIGHT.items()}

TEXT_STYLES = (("first", "-", "o"), ("second", "--", "s"), ("third", "-.", "^"), ("fourth", ":", "D"))
"""Colour, dash and marker of each held-out text, so that no two differ by colour alone."""

PART_COLOURS = ("train", "first", "second", "third", "fourth", "raw")


def css_variables() -> str:
    """The two schemes as CSS; the system's setting chooses."""
    return (
        f":root {{ {_declarations(LIGHT)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_declarations(DARK)} }} }}\n"
        f"@media print {{ :root {{ {_declarations({**LIGHT, 'paper': '#ffffff'})} }} }}\n"
    )


def _declarations(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())
