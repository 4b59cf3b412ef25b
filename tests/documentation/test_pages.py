"""What the pages name exists: links, files, keys of the configuration, options; and generated pages are current."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_pages import PAGES, ROOT, all_blocks, links_of, page_name, shell_lines, spans_of

from steep.cli.main import app, split_overrides
from steep.config.keys import is_component, item_type, section_of
from steep.config.load import load_run_config
from steep.config.run import RunConfig
from steep.core.errors import ConfigError
from steep.models.gpt2 import build_gpt2_model

SECTIONS = tuple(RunConfig.model_fields)
CUSTOM_ARGUMENTS = {"width"}
"""Arguments of examples/custom_model's `build` that a command overrides."""
FILE = re.compile(r"[\w.-]+(/[\w.-]+)*/[\w.-]+\.(py|md|yaml|toml)")
FILE_ENDINGS = (".py", ".md", ".yaml", ".json", ".jsonl", ".lock", ".log", ".html")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and f"#-{anchor}\n" not in target.read_text().lower().replace(" ", "-")):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page: Path) -> None:
    places = (ROOT, page.parent, ROOT / "src", ROOT / "src" / "steep", ROOT / "tests")
    named = [span for span in spans_of(page) if FILE.fullmatch(span) and not span.startswith("./")]
    assert not [name for name in named if not any((place / name).exists() for place in places)]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_no_page_names_a_place_on_somebodys_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.])/(?:tmp|work|home|root|Users)/", page.read_text(encoding="utf-8"))


def test_generated_pages_are_current() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path, text in module.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not current: run make docs"


def key_exists(key: str) -> bool:
    """Whether a dotted key is one of the configuration; list positions and free names of mappings count as themselves."""
    section: Any = RunConfig
    annotation: Any = None
    for part in key.split("."):
        if section is None:  # inside a list or mapping: any position or name, then its section
            annotation, section = None, section_of(item_type(annotation))
            if section is None:
                return False
            continue
        if part not in section.model_fields:
            return False
        annotation = section.model_fields[part].annotation
        section = section_of(annotation)
    return True


def target_argument(key: str) -> bool:
    """Whether a key is an argument of a model's `_target_` in the pages."""
    first, _, rest = key.partition(".")
    arguments = {*inspect.signature(build_gpt2_model).parameters, *CUSTOM_ARGUMENTS}
    return first == "model" and is_component(RunConfig.model_fields["model"].annotation) and rest in arguments


def test_key_exists_knows_a_wrong_key() -> None:
    assert key_exists("train.micro_batch_size")
    assert key_exists("data.train.0.path")
    assert key_exists("data.validation.general.share")
    assert not key_exists("train.microbatch_size")
    assert not key_exists("data.train.0.weigth")
    assert not key_exists("data.validation.general.shares")
    assert not target_argument("model.n_layers")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_keys_exist(page: Path) -> None:
    keys = []
    fields_of_files = {"docs/reference/token_store.md": {"tokenizer.fingerprint"}}.get(page_name(page), set())
    for span in spans_of(page):
        first_word = span.split()[0].removeprefix("--").rstrip(":") if span.split() else ""
        if re.fullmatch(rf"({'|'.join(SECTIONS)})(\.\w+)+", first_word) and not first_word.endswith(FILE_ENDINGS):
            keys.append(first_word)
    for block in all_blocks():
        if block.page == page_name(page) and block.language == "bash":
            for line in shell_lines(block):
                _, overrides = split_overrides(shlex.split(line, comments=True)[2:])
                keys += [word[2:].partition("=")[0] for word in overrides if word.startswith("--")]
    assert not [key for key in keys if not key_exists(key) and not target_argument(key) and key not in fields_of_files]


def options() -> dict[str, set[str]]:
    """The long options of each command, those of its own commands among them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {
            option
            for part in [command, *getattr(command, "commands", {}).values()]
            for parameter in part.params
            for option in (*parameter.opts, *parameter.secondary_opts)
            if option.startswith("--") and option != "--help"
        }
        for name, command in commands.items()
    }


def test_commands_and_options_in_blocks_exist() -> None:
    known = options()
    for block in all_blocks():
        for line in shell_lines(block) if block.language == "bash" else []:
            words = shlex.split(line, comments=True)
            if words[0] == "steep" and words[1] != "--version":
                plain, _ = split_overrides(words[2:])
                wrong = {word.partition("=")[0] for word in plain if word.startswith("--")} - known[words[1]]
                assert not wrong, f"{block}: steep {words[1]} has no {wrong}"


def test_the_command_line_page_lists_every_command_and_option() -> None:
    text = (ROOT / "docs" / "reference" / "command_line.md").read_text(encoding="utf-8")
    listed: dict[str, set[str]] = {}
    command = ""
    for row in re.findall(r"^\|(.*?)\|(.*?)\|", text.partition("## Options by command")[2], re.MULTILINE):
        command = row[0].strip(" `") or command
        listed.setdefault(command, set()).update(re.findall(r"`(--[\w-]+)`", row[1]))
    expected = {name: found for name, found in options().items() if found}
    assert {name: found for name, found in listed.items() if found} == expected
    for name in options():
        assert f"\nsteep {name} " in text


@pytest.mark.parametrize("example", sorted(path.parent.name for path in (ROOT / "examples").glob("*/run.yaml")))
def test_examples_load(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "examples" / example
    assert (folder / "README.md").exists()
    for name in ("text", "tokenizer", "tokens"):
        (tmp_path / name).mkdir()
    (tmp_path / "models").mkdir()
    plays = [f"text/{name}{part}.jsonl" for name in ("shakespeare", "python") for part in ("", "_held_out")]
    for file in ("text/one.txt", "general.txt", "models/smollm2.gguf", *plays):
        (tmp_path / file).write_text("A document.", encoding="utf-8")
    for source in folder.glob("*.py"):
        (tmp_path / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_run_config(folder / "run.yaml"), RunConfig)


YAML_BLOCKS = [block for block in all_blocks() if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=str)
def test_configurations_in_pages_load(block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text", "tokens/llm_c", "tokenizer", "corpus", "for_automodel"):
        Path(name).mkdir(parents=True)
    Path("general.txt").write_text("A document.", encoding="utf-8")
    Path("my_model.py").write_text("def build(vocab_size):\n    pass\n", encoding="utf-8")
    parts = {"model": "model: {pretrained: gpt2}\n", "data": "data: {train: [{path: text}]}\n"}
    given = re.findall(r"^(\w+):", block.text, re.MULTILINE)
    text = block.text + "".join(part for name, part in parts.items() if name not in given)
    path = Path(block.name or "block.yaml")
    path.write_text(text, encoding="utf-8")
    if block.name != "wrong.yaml":
        load_run_config(path)
        return
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    page = (ROOT / block.page).read_text(encoding="utf-8")
    assert f"```\nerror: {caught.value}\n```" in page, "the page shows another message"
