"""Linear combinations of weights: by hand, bit for bit at the ends, refusals that name what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steep.core.errors import ConfigError, ModelError
from steep.merge.blend import BlendPoint, blend_plot
from steep.merge.weights import FolderWeights, combine, write_model


def folder(path: Path, **tensors: torch.Tensor) -> FolderWeights:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    return FolderWeights(path)


def test_the_cap_is_in_the_picture_of_a_blend() -> None:
    points = [BlendPoint(alpha, {"own": 0.9 - 0.1 * alpha, "general": 0.8 + 0.02 * alpha}) for alpha in (0.0, 0.5, 1.0)]
    figure = blend_plot(points, points[1], "manuals", ["general"], 0.015)
    [axes] = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["general, cap: base + 1.5 %"] == [0.8 * 1.015] * 2
    assert set(lines) == {"own", "general", "general, cap: base + 1.5 %", "chosen: alpha 0.5"}
    assert figure.get_suptitle().startswith("manuals: ")


def test_a_blend_is_what_is_computed_by_hand(tmp_path: Path) -> None:
    base = folder(tmp_path / "a", w=torch.tensor([1.0, 2.0]))
    trained = folder(tmp_path / "b", w=torch.tensor([3.0, -2.0]))
    assert combine([base, trained], [0.75, 0.25])["w"].tolist() == [1.5, 1.0]


def test_the_ends_are_the_models_bit_for_bit(tmp_path: Path) -> None:
    base = folder(tmp_path / "a", w=torch.randn(64).bfloat16())
    trained = folder(tmp_path / "b", w=torch.randn(64))
    for factors, expected in (([1.0, 0.0], base), ([0.0, 1.0], trained)):
        out = write_model(combine([base, trained], factors), base.folder, tmp_path / str(factors[0]), "card")
        written = load_file(out / "model.safetensors")["w"]
        assert written.dtype == expected["w"].dtype
        assert torch.equal(written, expected["w"])
        assert json.loads((out / "config.json").read_text()) == {"dtype": str(written.dtype).removeprefix("torch.")}


def test_the_sum_is_made_in_fp32(tmp_path: Path) -> None:
    models = [folder(tmp_path / str(i), w=torch.tensor([256.0 if i == 0 else 1.0]).bfloat16()) for i in range(3)]
    assert combine(models, [1.0, 1.0, 1.0])["w"].item() == 258.0  # in bf16, 256 + 1 + 1 is 256


def test_models_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    first = folder(tmp_path / "a", w=torch.zeros(2))
    with pytest.raises(ModelError, match=r"w has shape \[2\]"):
        combine([first, folder(tmp_path / "b", w=torch.zeros(3))], [0.5, 0.5])
    with pytest.raises(ModelError, match="has v"):
        combine([first, folder(tmp_path / "c", w=torch.zeros(2), v=torch.zeros(1))], [0.5, 0.5])
    with pytest.raises(ConfigError, match="already exists"):
        write_model({}, first.folder, first.folder, "card")
