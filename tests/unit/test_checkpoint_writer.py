"""The safetensors writer against the safetensors library, and the copy to host memory."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steep.checkpoint.safetensors_writer import DTYPE_NAMES, write_safetensors
from steep.checkpoint.staging import HostStaging
from steep.core.errors import CheckpointError


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes seen as `dtype`: every bit pattern, NaNs included. Booleans are 0 or 1."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    last = shape[-1] * torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], last), dtype=torch.uint8).view(dtype)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and (torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8)))
    )


def mixed_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"layers.{i}.{name}": random_tensor(dtype, 3, 5) for i, (dtype, name) in enumerate(DTYPE_NAMES.items())}
    return tensors | {
        "scalar": torch.tensor(7.0),
        "empty": torch.empty(0, 4),
        "été": torch.arange(3),
        "transposed": torch.randn(4, 6).t(),
        "sliced": torch.randn(10, 10)[2:5, ::3],
    }


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    tensors = {"a": random_tensor(dtype, 7, 3), "b": random_tensor(dtype, 1)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(same_bytes(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_file_equals_the_one_the_library_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in mixed_tensors().items()}
    entry = write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    data = (tmp_path / "ours").read_bytes()
    assert data == (tmp_path / "theirs").read_bytes()
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_bytes_do_not_depend_on_the_order_of_the_mapping(tmp_path):
    tensors = mixed_tensors()
    one = write_safetensors(tmp_path / "one", tensors)
    two = write_safetensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert one == two
    assert all(same_bytes(loaded, tensors[name]) for name, loaded in load_file(tmp_path / "one").items())


def test_several_blocks_and_no_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("steep.checkpoint.safetensors_writer.BLOCK_BYTES", 1000)
    big = torch.randn(12_345)
    write_safetensors(tmp_path / "big", {"big": big})
    assert torch.equal(load_file(tmp_path / "big")["big"], big)
    write_safetensors(tmp_path / "none", {})
    assert load_file(tmp_path / "none") == {}


def test_a_dtype_that_the_format_has_not_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"z \(torch\.complex128\)"):
        write_safetensors(tmp_path / "x", {"z": torch.zeros(1, dtype=torch.complex128)})


def test_staging_copies_and_reuses_its_memory():
    staging: HostStaging[str] = HostStaging()
    tensors = mixed_tensors()
    first = staging.copy(tensors)
    staging.wait()
    assert all(same_bytes(first[name], tensor) for name, tensor in tensors.items())
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert not set(addresses.values()) & {t.data_ptr() for t in tensors.values() if t.numel()}
    tensors["scalar"].fill_(8.0)
    assert first["scalar"] == 7.0
    second = staging.copy(tensors)
    assert second["scalar"] == 8.0
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses
    changed = staging.copy({**tensors, "more": torch.ones(2)})
    assert torch.equal(changed["more"], torch.ones(2))
    assert staging.copy({}) == {}
