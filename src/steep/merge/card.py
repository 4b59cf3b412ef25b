"""The README.md of a merged model."""

from __future__ import annotations

from steep import __version__


def merge_card(title: str, lines: list[str]) -> str:
    """Markdown with the metadata block that model hubs read, and what the model is made of, a line each."""
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [steep, merge]", "---", ""]
    made = [f"- {line}" for line in lines]
    return "\n".join([*head, f"# {title}", "", f"Made with steep {__version__}, combined in fp32:", "", *made, ""])
