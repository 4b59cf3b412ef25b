"""A run of a stranger runs no code when it is read: only what training here has run, or `--allow-code`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import steep
from steep.config.yaml_file import parse_yaml
from steep.core import targets
from steep.core.errors import ConfigError
from steep.core.section import Target
from support import run_mapping
from support import steep as run_steep

MODEL = '''
import os
from types import SimpleNamespace
from torch import nn
open({marker!r}, "a").write("x")

class Own(nn.Module):
    """A model that is none of transformers, so that its checkpoints hold no folder that transformers loads."""
    def __init__(self, width):
        super().__init__()
        self.embed, self.head = nn.Embedding(512, width), nn.Linear(width, 512)
    def forward(self, input_ids, **others):
        return SimpleNamespace(logits=self.head(self.embed(input_ids)))

def build(width=8):
    return Own(width)
'''
REFUSED = "names code that builds its model"


@pytest.fixture
def run(
    tmp_path: Path, corpus_directory: Path, tiny_tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run of a model in a file, trained here; `ran` beside it exists where the file has been imported since."""
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "own_cache"))
    (tmp_path / "model.py").write_text(MODEL.format(marker=str(tmp_path / "ran")), encoding="utf-8")
    model = {"_target_": f"{tmp_path / 'model.py'}:build", "width": 8}
    steep.train(run_mapping(tmp_path, corpus_directory, tiny_tokenizer_directory, model=model, train={"steps": 2}))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    return tmp_path / "runs" / "small"


def _generates(run: Path, **arguments: bool) -> bool:
    """Whether it may, in a process that has not imported the model yet."""
    return bool(steep.generate(run, "The", max_new_tokens=2, **arguments))


def test_a_run_of_this_machine_is_read_without_a_word(run: Path, tmp_path: Path) -> None:
    for command in (["generate", str(run), "--prompt", "The", "--max-new-tokens", "2"], ["evaluate", str(run)]):
        done = run_steep(*command)
        assert done.returncode == 0, done.stderr
        assert "--allow-code" not in done.stderr
    assert (tmp_path / "ran").exists()
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere" / "copy"))
    assert _generates(moved)
    keys = list((tmp_path / "own_cache").rglob("key"))
    assert [key.stat().st_mode & 0o777 for key in keys] == [0o600]
    assert [key.parent.stat().st_mode & 0o777 for key in keys] == [0o700]


COMMANDS = {
    "generate": ["--prompt", "The", "--max-new-tokens", "2"],
    "evaluate": [],
    "export": [],
    "chat": [],
}


@pytest.mark.parametrize(
    "command",
    [
        "generate",
        "inspect",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("evaluate", "export", "chat", "blend", "average", "push")
        ),
    ],
)
def test_a_run_of_a_stranger_runs_nothing(command: str, run: Path, tmp_path: Path) -> None:
    done = run_steep(command, str(run), *COMMANDS.get(command, []), STEEP_CACHE=str(tmp_path / "other"))
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in done.stderr
    if command in COMMANDS:
        assert done.returncode == 2, done.stdout
        for part in (REFUSED, str(tmp_path / "model.py"), str(run / "config.yaml"), "--allow-code"):
            assert part in done.stderr


def test_the_user_may_allow_or_refuse_it(run: Path, tmp_path: Path) -> None:
    command = ["generate", str(run), "--prompt", "The", "--max-new-tokens", "2"]
    refused = run_steep(*command, "--no-code")
    assert refused.returncode == 2
    assert "refused by --no-code" in refused.stderr
    assert not (tmp_path / "ran").exists()
    assert run_steep(*command, "--allow-code", STEEP_CACHE=str(tmp_path / "other")).returncode == 0
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["source", "argument", "another", "nested", "package", "key", "open key"])
def test_anything_changed_is_a_strangers(change: str, run: Path, tmp_path: Path) -> None:
    config, marker = run / "config.yaml", tmp_path / "evil_ran"
    evil = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\ndef build(width=8): ...\n"
    written = config.read_text(encoding="utf-8")
    key = next((tmp_path / "own_cache").rglob("key"))
    if change == "source":
        (tmp_path / "model.py").write_text(evil, encoding="utf-8")
    elif change == "argument":
        config.write_text(written.replace("width: 8", "width: 16"), encoding="utf-8")
    elif change == "another":
        (tmp_path / "evil.py").write_text(evil, encoding="utf-8")
        config.write_text(written.replace("model.py:build", "evil.py:build"), encoding="utf-8")
    elif change == "nested":
        (tmp_path / "evil.py").write_text(evil, encoding="utf-8")
        nested = f"width: {{_target_: '{tmp_path / 'evil.py'}:build'}}"
        config.write_text(written.replace("width: 8", nested), encoding="utf-8")
    elif change == "package":
        name = f"{tmp_path / 'model.py'}:build"
        config.write_text(
            written.replace(name, "os.system").replace("width: 8", f"command: touch {marker}"), encoding="utf-8"
        )
    elif change == "key":
        key.unlink()
    else:
        key.chmod(0o644)
    assert change in ("source", "key", "open key") or config.read_text(encoding="utf-8") != written
    with pytest.raises(ConfigError, match=REFUSED):
        _generates(run)
    assert not marker.exists()


def test_what_no_code_allows_needs_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path))
    harmless = Target.model_validate({"_target_": "steep.models.gpt2.build_gpt2_model", "vocab_size": 64})
    assert targets.code_is_allowed(harmless, None) is False  # built as with --no-code
    tricky = {
        "_target_": "transformers.AutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "./evil",
    }
    with pytest.raises(ConfigError, match=REFUSED):
        targets.code_is_allowed(Target.model_validate(tricky), None)


def test_a_cache_that_cannot_be_written_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STEEP_CACHE", str(tmp_path / "file"))
    said: list[str] = []
    target = Target.model_validate({"_target_": "steep.models.gpt2.build_gpt2_model"})
    targets.note_trained(target, said.append)
    assert "--allow-code" in said[0]
    with pytest.raises(ConfigError, match=REFUSED):
        targets.code_is_allowed(Target.model_validate({"_target_": "os.system", "command": "true"}), None)


def test_the_written_configuration_is_what_is_noted(run: Path) -> None:
    """Training notes what config.yaml says, not what it was given: reading that file must find it."""
    model = parse_yaml((run / "config.yaml").read_text(encoding="utf-8")).data["model"]
    assert targets.code_is_allowed(Target.model_validate(model), None) is True
