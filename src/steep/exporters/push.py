"""`steep push`: a trained model on a hub, with its model card. In: a run, or the folder of an export. Out: its address.

The files are those of `steep export --to hf`, so what is uploaded was loaded and compared first. The upload is huggingface_hub's
own: one commit, large files in parts, repeated after a network failure.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steep.core.errors import ConfigError, ModelError, first_line
from steep.core.hub import hub_silence
from steep.core.public import public
from steep.core.say import Say, tell
from steep.core.units import format_bytes
from steep.evaluation.model_reference import Reference, run_of
from steep.exporters.run import export
from steep.runtime.run_directory import is_run_directory


@dataclass(frozen=True)
class PushResult:
    """A model on a hub."""

    repository: str
    url: str
    """Of the commit."""
    folder: Path
    """What was uploaded."""
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.repository}: {format_bytes(self.size_bytes)} uploaded\n{self.url}"


@public
def push(
    model: Reference,
    repository: str,
    *,
    public: bool = False,
    revision: str | None = None,
    dtype: str | None = None,
    message: str | None = None,
    say: Say = tell,
) -> PushResult:
    """Export a model and upload it to a hub with its model card, in one commit.

    model: a run, whose export goes to `<run>/export/hub`, or a folder that `steep export` wrote. repository: `user/name`;
    made if it is not there, private unless `public`. revision: a branch, made if it is not there; default main. dtype: as for
    `steep.export`. message: of the commit. say: called with each remark. The hub is that of HF_ENDPOINT, the login that of
    `hf auth login` or HF_TOKEN. Raises ConfigError where the hub does not answer or does not know the login, before anything
    is exported, and for a public repository without `public`; ModelError if the upload fails.
    """
    from huggingface_hub import HfApi  # a network client

    check_repository(repository)
    api = HfApi()
    user = logged_in(api)
    folder = exported(model, dtype, say)
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        is_public = api.repo_info(repository).private is False
        if is_public and not public:
            raise ConfigError(
                f"{repository} is public: give --public to upload to it, or the name of another repository"
            )
        say(f"{user} pushes {folder} to {repository} ({'public' if is_public else 'private'})")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message or f"{Path(os.fspath(model)).resolve().name}, exported by steep",
        )
    except hub_errors() as error:
        raise ModelError(
            f"{repository}: the upload failed ({first_line(error)}); the same command tries it again"
        ) from error
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return PushResult(repository, str(commit.commit_url), folder, size)


def hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for an answer that refuses, and for a connection that fails."""
    from huggingface_hub.errors import HfHubHTTPError  # as above

    # Connections fail with errors of httpx, a package that has had several names; HfHubHTTPError is made of its base class.
    return (OSError, next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"))


def check_repository(repository: str) -> None:
    """Raises ConfigError for a name that no hub takes."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # as above

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{repository!r} is not a repository: give USER/NAME ({first_line(error)})") from None
    if repository.count("/") != 1:
        raise ConfigError(f"{repository!r} is not a repository: give USER/NAME, such as ada/{repository}")


def logged_in(api: Any) -> str:
    """The name of the login of an HfApi. Raises ConfigError where the hub does not answer, or there is none."""
    if reason := hub_silence():
        raise ConfigError(f"nothing can be pushed: {reason}")
    try:
        return str(api.whoami()["name"])
    except hub_errors() as error:
        raise ConfigError(
            f"you are not logged in to the hub ({first_line(error)}): run `hf auth login`, or set HF_TOKEN to a token "
            "that can write"
        ) from None


def exported(model: Reference, dtype: str | None, say: Say) -> Path:
    """The folder to upload: an export as it is, or a new export of a run. Raises ConfigError for anything else."""
    path = Path(os.fspath(model))
    if is_run_directory(path):
        return export(model, out=path / "export" / "hub", dtype=dtype, overwrite=True, say=say).path
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ConfigError(f"{model} is neither a run nor a folder that steep export --to hf wrote")
    if dtype is not None:
        raise ConfigError(f"--dtype {dtype}: {model} is exported already; leave it out, or give the run")
    if not (path / "README.md").is_file():
        run = run_of(path)
        raise ConfigError(f"{model} has no model card (README.md): write one, or give {run or 'the run'}")
    return path
