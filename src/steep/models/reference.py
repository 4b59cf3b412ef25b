"""What a reference to a model means. In: what the user names. Out: a folder or file, or None for a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steep.core.errors import ModelError
from steep.core.files import damaged, read_object
from steep.runtime.run_directory import read_latest

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG = "base_config.json"
"""transformers' configuration of the adapted model. Not `config.json`: transformers would expect all weights beside it."""
ADAPTED_SETTINGS = ("vocab_size", "rope_parameters", "max_position_embeddings")
"""What a run may change in the configuration of a base that it adapts."""


def resolve_reference(reference: str) -> Path | None:
    """The folder or .gguf file that `reference` means: itself, or a run's or checkpoint's consolidated model.

    None if it is a hub id. Raises ModelError if it is a local path that holds no model.
    """
    path = Path(reference).expanduser()
    if path.is_dir():
        return _model_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.is_file():
        raise ModelError(f"{reference} is a file; give a folder with config.json and *.safetensors, or a .gguf file")
    if path.suffix == ".gguf" or reference.startswith((".", "/", "~")) or reference.count("/") > 1:
        raise ModelError(f"{reference} does not exist")
    return None


def _model_folder(folder: Path) -> Path:
    """`folder` if it holds a model or an adapter; the consolidated model of a checkpoint or of a run's last checkpoint."""
    if _holds_model(folder):
        return folder
    if _holds_model(folder / "model" / "consolidated"):
        return folder / "model" / "consolidated"
    latest = (folder if folder.name == "checkpoints" else folder / "checkpoints") / "LATEST"
    if latest.is_file():
        if (name := read_latest(latest.parent)) is None:
            raise damaged(latest, "it does not name a checkpoint, such as epoch_0_step_500")
        checkpoint = latest.parent / name
        if _holds_model(checkpoint / "model" / "consolidated"):
            return checkpoint / "model" / "consolidated"
        raise ModelError(f"{latest} names {checkpoint.name}, which holds no model/consolidated/config.json")
    if (folder / "checkpoints").is_dir():
        raise ModelError(f"{folder} is a run without a complete checkpoint (checkpoints/LATEST is missing)")
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    found = f"; it holds {len(ggufs)} .gguf files: name one of them" if ggufs else ""
    raise ModelError(f"{folder} holds no config.json, checkpoint or run of steep{found}")


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG).is_file()


def lasting_reference(reference: str | None) -> str | None:
    """A local path made absolute, so that it is found from other folders; a hub id unchanged."""
    if reference is None:
        return None
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference


def quantization_of(folder: str | Path) -> dict[str, Any] | None:
    """The quantization_config of a model folder; None if it has none or is not a folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    found = read_object(path).get("quantization_config")
    return found if isinstance(found, dict) else None


def named_base(folder: Path) -> tuple[str, str | None]:
    """What the adapter in `folder` was trained on, and its revision on the hub. Raises ModelError if its settings do not say."""
    try:
        settings = read_object(folder / ADAPTER_CONFIG)
        base = settings["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} cannot be read ({error})") from None
    if not isinstance(base, str) or not base:
        raise ModelError(f"{folder} holds an adapter that names no base (base_model_name_or_path in {ADAPTER_CONFIG})")
    return base, settings.get("revision")


def base_reference(folder: Path) -> tuple[str, str | None]:
    """As `named_base`; raises ModelError also for a local base that is gone."""
    base, revision = named_base(folder)
    if is_gone(base):
        raise ModelError(gone_base(folder, base))
    _refuse_circle(folder, base)
    return base, revision


def _refuse_circle(folder: Path, base: str) -> None:
    """Raises ModelError where adapters are the base of each other, or one of itself."""
    seen, path = [folder.resolve()], resolve_reference(base)
    while path is not None and (path / ADAPTER_CONFIG).is_file():
        if path.resolve() in seen:
            raise ModelError(f"{folder} holds an adapter that leads back to itself as its own base, by way of {path}")
        seen.append(path.resolve())
        path = resolve_reference(named_base(path)[0])


def is_gone(reference: str) -> bool:
    """Whether a reference is a local path where there is nothing."""
    is_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1
    return is_path and not Path(reference).expanduser().exists()


def gone_base(folder: Path, base: str) -> str:
    """What to do about an adapter whose base is gone, for a message."""
    checkpoint = next((part for part in Path(base).parents if part.parent.name == "checkpoints"), None)
    if checkpoint is not None:
        run = checkpoint.parent.parent
        return (
            f"{folder} holds an adapter, and its base is gone: the checkpoint {checkpoint.name} of the run {run}. An adapter is "
            f"of no use without it. Restore {base}, or train again from {run} under another --run.name"
        )
    return (
        f"{folder} holds an adapter, and its base is gone: {base}. An adapter is of no use without it. Put the base back there, "
        f"or make a link to where it is now (ln -s NEW_PLACE {base})"
    )


def describe_origin(reference: str) -> str | None:
    """A line on where the weights come from, for a reference that means an adapter; None for any other.

    Raises ModelError for an adapter whose base is gone.
    """
    adapters: list[str] = []
    base, folder = reference, resolve_reference(reference)
    while folder is not None and (folder / ADAPTER_CONFIG).is_file():
        adapters.insert(0, _short(folder))
        base, _ = base_reference(folder)
        folder = resolve_reference(base)
    if not adapters:
        return None
    return f"model: {base} with the adapter of {', then that of '.join(adapters)} added to its weights (merged)"


def _short(folder: Path) -> str:
    """A model folder as people know it: for the one in a checkpoint, the run and the checkpoint."""
    if (folder.parent.name, folder.name) != ("model", "consolidated"):
        return str(folder)
    checkpoint = folder.parent.parent
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return f"{run} ({checkpoint.name})"


def adapted_settings(folder: Path) -> dict[str, Any]:
    """What the model of an adapter that steep trained has in another size than its base: vocabulary and rotary positions.

    From transformers' configuration of the adapted model, which steep writes beside an adapter; empty without one.
    """
    path = folder / BASE_CONFIG
    content = read_object(path) if path.is_file() else {}
    text = content.get("text_config") or content
    return {name: text[name] for name in ADAPTED_SETTINGS if name in text}
