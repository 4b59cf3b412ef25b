"""The files of a model's weights, checked before a weight is read. In: a folder. Out: nothing, or an error that names the file.

What a run would find out when it loads the model, a plan finds out from the headers of the files. Whether names and shapes are
those of the model, transformers says: `load.check_weights` lets it load them onto the meta device, without data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steep.core.errors import ModelError
from steep.core.files import read_object
from steep.core.units import format_bytes, listing

INDEX = "model.safetensors.index.json"
SETTINGS_FILES = ("config.json", "generation_config.json", "adapter_config.json")
AGAIN = "Copy or download it again, or name another model."


def check_files(folder: Path) -> None:
    """Raises ModelError for safetensors that are missing or cut off, and for a folder that holds its weights as pickles only;
    DamagedFileError for settings beside them that cannot be read."""
    for name in SETTINGS_FILES:
        if (folder / name).is_file():
            read_object(folder / name)  # transformers fails on a list
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_index(index).values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{folder} is not complete: {INDEX} names {len(names)} files of weights, and {len(missing)} are not there: "
                f"{listing(missing)}. {AGAIN}"
            )
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if not files and pickles:
            raise ModelError(
                f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when read; steep reads "
                "*.safetensors only. If you trust it, convert it once: load it with transformers, then save_pretrained."
            )
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors, so there are no weights to start from")
    for file in files:
        _check_length(file)


def _read_index(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(value) for key, value in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error}). {AGAIN}") from None


def _check_length(file: Path) -> None:
    """A safetensors file is as long as its header says: 8 bytes, that many of JSON, then the tensors."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(min(header_bytes, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{file} is not a safetensors file, or its beginning is damaged. {AGAIN}") from None
    if size < (needed := 8 + header_bytes + max(ends, default=0)):
        raise ModelError(f"{file} is cut off: it has {format_bytes(size)} of {format_bytes(needed)}. {AGAIN}")
