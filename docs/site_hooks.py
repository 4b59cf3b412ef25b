"""What mkdocs needs besides the pages of docs/: links that lead out of it (examples, tests, results) get a page in the site.

A Markdown file becomes a page, another text a page that shows it, a picture or other binary file is copied. A link to a folder is
refused, and so is one to nothing. mkdocs calls `on_config`, `on_files` and `on_page_markdown` by name (its `hooks` setting).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
OUTSIDE = "repository"
SECTIONS = {"Tutorials": "tutorials", "How to": "how_to", "Reference": "reference", "Design": "design"}
TEXTS = {".py", ".yaml", ".yml", ".toml", ".txt", ".sh", ".cff", ""}


def on_config(config: Any) -> Any:
    """The navigation: the sections in the order in which people need them, each with its overview first."""
    pages = {
        title: sorted(
            (path.relative_to(DOCS).as_posix() for path in (DOCS / folder).glob("*.md")),
            key=lambda name: (not name.endswith("/README.md"), name),
        )
        for title, folder in SECTIONS.items()
    }
    config.nav = ["README.md", *({title: names} for title, names in pages.items())]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file outside docs/ that a page links to, and for those that these link to."""
    waiting = [(path.read_text(encoding="utf-8"), path) for path in sorted(DOCS.rglob("*.md"))]
    seen: set[str] = set()
    while waiting:
        text, path = waiting.pop()
        for target in outside_targets(text, path):
            name = page_of(target)
            if name not in seen:
                seen.add(name)
                files.append(generated(config, name, target))
                if target.suffix == ".md":
                    waiting.append((target.read_text(encoding="utf-8"), target))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links that leave docs/ to the pages that on_files made. HTML comments that mark tested blocks are left out."""
    source = source_of(page.file.src_uri)
    markdown = re.sub(r"^<!-- (?:test|file): .* -->\n", "", markdown, flags=re.MULTILINE)

    def replaced(match: re.Match[str]) -> str:
        if is_address(match[2]):
            return match[0]
        target = (source.parent / match[2]).resolve()
        name = str(target.relative_to(DOCS)) if target.is_relative_to(DOCS) else page_of(target)
        up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
        return f"{match[1]}{up}{name}{match[3] or ''}{match[4]}"

    return LINK.sub(replaced, markdown)


def source_of(uri: str) -> Path:
    """The file that a page of the site was made from."""
    parts = PurePosixPath(uri).parts
    if parts[0] != OUTSIDE:
        return DOCS / uri
    path = ROOT.joinpath(*parts[1:])
    return path if path.exists() else path.with_suffix("")


def outside_targets(text: str, path: Path) -> list[Path]:
    """The files outside docs/ that a page links to. Raises PluginError for one that is no file."""
    found = []
    for match in LINK.finditer(text):
        target = (path.parent / match[2]).resolve()
        if is_address(match[2]) or target.is_relative_to(DOCS):
            continue
        if not target.is_file() or not target.is_relative_to(ROOT):
            raise PluginError(f"{path}: the link {match[2]} leads to {target}, which is not a file of the repository")
        found.append(target)
    return found


def is_address(link: str) -> bool:
    """Whether a link leaves the repository, or stays on its page."""
    return "://" in link or link.startswith(("mailto:", "#"))


def page_of(target: Path) -> str:
    """Where the site has a file outside docs/: its own name, with `.md` added to a text that is not Markdown."""
    name = f"{OUTSIDE}/{target.relative_to(ROOT).as_posix()}"
    return f"{name}.md" if target.suffix in TEXTS else name


def generated(config: Any, name: str, target: Path) -> File:
    """The site's file for a file outside docs/."""
    if target.suffix not in TEXTS:
        return File.generated(config, name, abs_src_path=str(target))
    text, title = target.read_text(encoding="utf-8"), target.relative_to(ROOT).as_posix()
    return File.generated(config, name, content=f"# {title}\n\n~~~~{target.suffix.lstrip('.')}\n{text}\n~~~~\n")
