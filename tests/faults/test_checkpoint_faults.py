"""Checkpoints that were damaged, and disks that do not take them: named, passed over, nothing lost."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steep.checkpoint.folder import CheckpointState
from steep.checkpoint.load import find_checkpoint, load_tensors, verify
from steep.checkpoint.manifest import MANIFEST_NAME, canonical_text, checkpoint_name
from steep.checkpoint.pieces import whole_pieces
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError
from steep.core.fingerprint import fingerprint

GOOD, NEWEST = "epoch_0_step_1", "epoch_0_step_2"
FILES = [
    MANIFEST_NAME, "config.yaml", "train_state.json", "rng/rank_00000.json", "model/rank_00000.safetensors",
    "model/shards.json", "model/consolidated/config.json", "model/consolidated/model.safetensors",
    "optim/rank_00000.safetensors", "optim/shards.json", "optim/state.json",
]  # fmt: skip


def state(step: int, elements: int = 2000) -> CheckpointState:
    return CheckpointState(
        model=whole_pieces({"w": torch.full((elements,), float(step)), "b": torch.full((3,), step)}),
        optimizer=whole_pieces({"w.exp_avg": torch.full((elements,), float(step))}),
        optimizer_state={"class": "AdamW", "param_groups": [], "state": {}},
        rng={"torch": "00"},
        config_yaml="run: {name: x}\n",
        step=step,
        tokens=step,
        sequences_seen=step,
        plan_fingerprint="f00",
        train_state={"step": step},
        hf_files={"config.json": b'{"model_type": "llama"}'},
    )


def find(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint that is found, and what was said."""
    said: list[str] = []
    return find_checkpoint(path, said.append), said


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    with CheckpointWriter(directory) as writer:
        for step in (1, 2):
            writer.save(checkpoint_name(0, step), state(step))
    return directory


@pytest.fixture
def checkpoints(pristine, tmp_path) -> Path:
    """Two checkpoints, consolidated weights not linked, so that each file can be damaged by itself."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def test_the_list_of_files_is_complete(pristine):
    assert files_of(pristine / NEWEST) == sorted(FILES)


def assert_named_and_passed_over(checkpoints: Path, name: str) -> None:
    path, messages = find(checkpoints)
    assert path.name == GOOD
    assert messages[0].startswith(f"{NEWEST} cannot be used: ")
    assert name in messages[0]
    assert messages[-1] == f"using {GOOD}"
    with pytest.raises(CheckpointError, match=f"{NEWEST} cannot be used: .*{re.escape(name)}"):
        verify(checkpoints / NEWEST)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_named_and_passed_over(checkpoints, name):
    file = checkpoints / NEWEST / name
    whole = file.read_bytes()
    generator = random.Random(name)
    header = min(len(whole), 400)  # safetensors: the header, and every byte of the small files
    positions = {0, 7, 8, len(whole) - 1, *range(0, header, 7), *(generator.randrange(len(whole)) for _ in range(10))}
    for position in sorted(p for p in positions if p < len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= generator.randrange(1, 256)
        file.write_bytes(damaged)
        if name == MANIFEST_NAME:
            path, messages = find(checkpoints)
            assert (path.name, name in messages[0]) == (GOOD, True), position
        else:
            assert_named_and_passed_over(checkpoints, name)
    file.write_bytes(whole)
    assert find(checkpoints) == (checkpoints / NEWEST, [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "longer", "a folder", "a fifo", "zeroed"])
def test_a_damaged_file_is_named_and_passed_over(checkpoints, name, how):
    file = checkpoints / NEWEST / name
    whole = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "a fifo":
        os.mkfifo(file)  # opening it would wait for a writer for ever
    elif how != "missing":
        damage = {"truncated": whole[:-1], "empty": b"", "longer": whole + b"\n", "zeroed": bytes(len(whole))}
        file.write_bytes(damage[how])
    if name == MANIFEST_NAME and how == "missing":
        assert find_checkpoint(checkpoints).name == GOOD
    else:
        assert_named_and_passed_over(checkpoints, name)


def test_a_file_of_another_checkpoint_is_noticed(checkpoints):
    name = "optim/rank_00000.safetensors"
    shutil.copy(checkpoints / GOOD / name, checkpoints / NEWEST / name)
    assert_named_and_passed_over(checkpoints, name)


def test_all_damaged_is_an_error_that_lists_every_reason(checkpoints):
    (checkpoints / NEWEST / "config.yaml").write_text("")
    (checkpoints / GOOD / MANIFEST_NAME).write_text("{")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(checkpoints)
    assert "epoch_0_step_2 cannot be used: config.yaml: has 0 bytes" in str(caught.value)
    assert "epoch_0_step_1 cannot be used: manifest.json: is not the JSON" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b'{"step": ' + b"9" * 5000 + b"}",
        b'{"format": "steep-checkpoint", "step": NaN}', b'{"format": "steep-checkpoint", "x": "\\ud800"}',
    ],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_a_manifest_that_is_none_is_corrupt(checkpoints, content):
    (checkpoints / NEWEST / MANIFEST_NAME).write_bytes(content)
    assert_named_and_passed_over(checkpoints, MANIFEST_NAME)


def reseal(checkpoint: Path, change) -> None:
    """Change a manifest and give it a right checksum, as an attacker would."""
    content = json.loads((checkpoint / MANIFEST_NAME).read_text())
    change(content)
    content.pop("checksum", None)
    content["checksum"] = fingerprint(content)
    (checkpoint / MANIFEST_NAME).write_text(canonical_text(content))


ENTRY = {"size": 0, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="other"),
        lambda m: m.update(step="1"),
        lambda m: m.update(step=True),
        lambda m: m.update(step=-1),
        lambda m: m.update(tokens=10**4000),
        lambda m: m.update(world_size=0),
        lambda m: m.update(world_size=10**12),
        lambda m: m.update(world_size=2),
        lambda m: m.update(score="low"),
        lambda m: m.update(plan_fingerprint=None),
        lambda m: m.pop("sequences_seen"),
        lambda m: m.update(files=[]),
        lambda m: m.update(files={}),
        lambda m: m["files"].pop("optim/shards.json"),
        lambda m: m["files"].update({"config.yaml": 3}),
        lambda m: m["files"].update({"config.yaml": {"size": "1", "sha256": "0" * 64}}),
        lambda m: m["files"].update({"config.yaml": {"size": 1, "sha256": "../x"}}),
        lambda m: m["files"].update({"../outside": ENTRY}),
        lambda m: m["files"].update({"/etc/passwd": ENTRY}),
        lambda m: m["files"].update({"model/../../outside": ENTRY}),
        lambda m: m["files"].update({"a\0b": ENTRY}),
        lambda m: m["files"].update({"": ENTRY}),
        lambda m: m["files"].update({"x" * 5000: ENTRY}),
    ],
)
def test_a_hostile_manifest_is_corrupt(checkpoints, change):
    reseal(checkpoints / NEWEST, change)
    path, messages = find(checkpoints)
    assert path.name == GOOD
    assert messages[0].startswith(f"{NEWEST} cannot be used: ")


def test_a_link_out_of_the_checkpoint_is_not_followed(checkpoints, tmp_path):
    file = checkpoints / NEWEST / "config.yaml"
    shutil.move(file, tmp_path / "outside.yaml")
    file.symlink_to(tmp_path / "outside.yaml")
    with pytest.raises(CheckpointError, match="not the name of a file inside"):
        verify(checkpoints / NEWEST)


def test_a_later_format_is_refused_and_not_passed_over(checkpoints):
    reseal(checkpoints / NEWEST, lambda m: m.update(format_version=99))
    with pytest.raises(CheckpointError, match="format 99; this version of steep reads up to 1. Update steep"):
        find_checkpoint(checkpoints)


FULL_DISK = """
import resource, sys, torch
sys.path.insert(0, sys.argv[3])
from test_checkpoint_faults import state
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError
writer = CheckpointWriter(sys.argv[1])
writer.save("epoch_0_step_1", state(1))
writer.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
writer.save("epoch_0_step_2", state(2, 100_000))
try:
    writer.wait()
except CheckpointError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if len(sys.argv) > 4:
    writer.save("epoch_0_step_3", state(3))
writer.close()
"""


def run_script(script: str, *arguments: object, **options) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("limit", [0, 300, 5000, 200_000])
def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path, limit):
    output = run_script(FULL_DISK, tmp_path, limit, Path(__file__).parent)
    assert re.match(r"disk full: needed 64\.8 MiB, had [\d.]+ [GT]iB in ", output), output
    assert f"last good checkpoint: {tmp_path / GOOD}" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", GOOD]
    assert find(tmp_path) == (tmp_path / GOOD, [])


def test_after_a_full_disk_the_next_save_succeeds(tmp_path):
    run_script(FULL_DISK, tmp_path, 5000, Path(__file__).parent, "again")
    assert find(tmp_path) == (tmp_path / "epoch_0_step_3", [])


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """The only fault that is not real: the test cannot fill the disk of the machine it runs on."""
    with CheckpointWriter(tmp_path) as writer:
        writer.save(GOOD, state(1))
        writer.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1 << 20))
        with pytest.raises(
            CheckpointError, match=rf"disk full: needed .* had 1.0 MiB .* last good checkpoint: .*{GOOD}"
        ):
            writer.save(NEWEST, state(2))
    assert find(tmp_path) == (tmp_path / GOOD, [])


SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
from test_checkpoint_faults import state
from steep.checkpoint.save import CheckpointWriter
from steep.core.errors import CheckpointError
try:
    with CheckpointWriter(sys.argv[1]) as writer:
        writer.save("epoch_0_step_2", state(2))
except CheckpointError as error:
    print(error)
"""


def obey_permissions() -> None:
    """Let even root be refused by file permissions after the next exec: drop CAP_DAC_OVERRIDE (Linux)."""
    if os.getuid() == 0:
        drop_from_bounding_set, override = 24, 1
        assert ctypes.CDLL(None).prctl(drop_from_bounding_set, override, 0, 0, 0) == 0


@pytest.mark.parametrize("there", [True, False])
def test_a_read_only_folder_is_named(checkpoints, tmp_path, there):
    locked = tmp_path / "locked"
    locked.mkdir()
    target = checkpoints if there else locked / "checkpoints"
    for folder in (checkpoints, locked):
        folder.chmod(0o555)
    try:
        output = run_script(SAVE, target, Path(__file__).parent, preexec_fn=obey_permissions)
    finally:
        for folder in (checkpoints, locked):
            folder.chmod(0o755)
    assert os.strerror(errno.EACCES) in output
    assert str(target) in output
    assert find(checkpoints) == (checkpoints / NEWEST, [])


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written to"):
        CheckpointWriter(tmp_path / "checkpoints")


def test_an_error_of_the_thread_is_raised_once_at_the_next_call(tmp_path):
    directory = tmp_path / "checkpoints"
    writer = CheckpointWriter(directory)
    shutil.rmtree(directory)
    directory.write_text("in the way")
    writer.save(GOOD, state(1))
    with pytest.raises(CheckpointError, match=f"saving {GOOD} failed"):
        writer.save(NEWEST, state(2))
    directory.unlink()
    directory.mkdir()
    writer.save(NEWEST, state(2))
    writer.close()
    assert find(directory) == (directory / NEWEST, [])


def test_a_state_that_json_has_not_is_raised_and_leaves_nothing(tmp_path):
    bad = CheckpointState(**{**vars(state(1)), "train_state": {"loss": float("nan")}})
    with pytest.raises(ValueError, match="JSON"), CheckpointWriter(tmp_path) as writer:
        writer.save(GOOD, bad)
    assert list(tmp_path.iterdir()) == []


def test_foreign_pickles_are_never_read(checkpoints):
    (checkpoints / NEWEST / "model" / "rank_00000.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert find(checkpoints) == (checkpoints / NEWEST, [])
    assert set(load_tensors(checkpoints / NEWEST, "model")) == {"w", "b"}
