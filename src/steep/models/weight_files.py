"""The files of a model's weights, checked before a weight is read. In: a folder. Out: nothing, or an error that names the file.

What a run would find out when it loads the model, a plan finds out from the headers of the files. Whether names and shapes are
those of the model, transformers says: `load.check_weights` lets it load them onto the meta device, without data. Weights that are
a pickle are refused here, before transformers or peft could open one: both read one where a file beside it names it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from steep.core.errors import ModelError
from steep.core.files import read_object
from steep.core.units import format_bytes, listing
from steep.models.reference import ADAPTER_CONFIG, ADAPTER_WEIGHTS

INDEX = "model.safetensors.index.json"
SETTINGS_FILES = ("config.json", "generation_config.json", "adapter_config.json")
AGAIN = "Copy or download it again, or name another model."
CONVERT = (
    "steep reads *.safetensors only. If you trust it, convert it once: load it with {library}, then save_pretrained."
)
NO_WEIGHTS_TO_MERGE = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT", "XLORA"
)  # fmt: skip
"""Kinds of adapter that change no weights of the base; peft reads other files, also pickles, for some of them."""


def check_files(folder: Path) -> None:
    """Raises ModelError for safetensors that are missing or cut off, and for a folder that holds its weights as pickles only;
    DamagedFileError for settings beside them that cannot be read."""
    for name in SETTINGS_FILES:
        if (folder / name).is_file():
            read_object(folder / name)  # transformers fails on a list
    index = folder / INDEX
    if index.is_file():
        names = index_names(index, folder)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ModelError(
                f"{folder} is not complete: of the {len(names)} files that {INDEX} names, {len(missing)} missing: "
                f"{listing(missing)}. {AGAIN}"
            )
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if not files and pickles:
            raise ModelError(
                f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run code when read; "
                + CONVERT.format(library="transformers")
            )
        if not files:
            raise ModelError(f"{folder} holds no *.safetensors, so there are no weights to start from")
    for file in files:
        _check_length(file)


def check_adapter_files(folder: Path) -> None:
    """Raises ModelError for an adapter whose weights are a pickle, missing or cut off, or of a kind that cannot be merged."""
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ModelError(
                f"{folder} holds its adapter as a pickle ({pickles[0].name}), which can run code when read; "
                + CONVERT.format(library="peft")
            )
        raise ModelError(
            f"{folder} holds {ADAPTER_CONFIG} and no {ADAPTER_WEIGHTS}, so there is no adapter to start from"
        )
    kind = read_object(folder / ADAPTER_CONFIG).get("peft_type")
    if kind in NO_WEIGHTS_TO_MERGE:
        raise ModelError(f"{folder} holds an adapter of kind {kind}, which cannot be added to weights; LORA can")
    _check_length(weights)


def check_gguf_neighbours(path: Path) -> None:
    """Raises ModelError for a .gguf file beside which transformers would find an adapter, pickled or not, and add it."""
    if (path.parent / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{path.parent} holds {ADAPTER_CONFIG} beside {path.name}, and transformers would add that adapter to it. Name the "
            f"folder to use the adapter, or put {path.name} into a folder of its own"
        )


def check_hub_files(hub_id: str, revision: str | None) -> None:
    """Raises ModelError for a model of the hub, where the hub can be asked, with which transformers would open a pickle."""
    from transformers.utils import cached_file  # a run from local files has no need of it

    def fetched(name: str) -> str | None:
        found: str | None = cached_file(
            hub_id,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    if fetched(ADAPTER_CONFIG) is not None:
        raise ModelError(
            f"{hub_id} is an adapter, or has one beside its weights. Fetch it first, and name the folder: hf download {hub_id} "
            "--local-dir FOLDER"
        )
    if (index := fetched(INDEX)) is not None:
        index_names(Path(index), hub_id)


def index_names(index: Path, where: str | Path) -> list[str]:
    """The files that an index of weights names. Raises ModelError for a damaged one, a pickle and a file elsewhere."""
    names = sorted(set(_read_index(index).values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{where}: {INDEX} names {name!r:.80}, which is no safetensors file and may be a pickle, which can run code when "
                "read; " + CONVERT.format(library="transformers")
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(f"{where}: {INDEX} names {name!r:.80}, which is not in the folder. {AGAIN}")
    return names


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
