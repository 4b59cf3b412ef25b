"""The Hugging Face hub: whether it can be asked, what its cache holds, and what to say where neither helps.

In: a hub id. Out: its folder in the cache, or None to ask the hub. Main choice: the hub is asked once, for five seconds at most,
before a library asks it: their own attempts take a minute and a page of warnings. The request goes through huggingface_hub's own
client, so that HF_ENDPOINT, HF_HUB_OFFLINE, proxies and certificates mean what they mean there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

from steep.core.errors import ModelError, first_line
from steep.core.say import tell

PROBE_SECONDS = 5.0
ANSWER_LASTS_SECONDS = 60
"""After this long the hub is asked again, so that a notebook may wait for the network."""
MOST_NAMED_IDS = 8
MODEL_FILES = ("config.json",)
LOCAL_MODELS = (
    "a local folder (config.json, *.safetensors, tokenizer.json), a .gguf file, for a tokenizer its tokenizer.json"
)
SWITCHED_OFF = "the hub is switched off here (HF_HUB_OFFLINE)"


def cached_folder(hub_id: str, revision: str | None = None, files: Sequence[str] = MODEL_FILES) -> Path | None:
    """The folder of a model or tokenizer in the cache, where the hub is switched off or does not answer; None if it can be asked.

    A folder, since transformers asks the hub for some files even of what it is told to read from the cache.
    files: any of them in the cache says that it holds what is wanted. Raises ModelError, with what works, if it does not.
    """
    from huggingface_hub import snapshot_download  # imports a network client
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = hub_silence()
    if not reason:
        return None
    cached = cached_ids(files)
    if hub_id not in cached:
        raise ModelError(not_at_hand(hub_id, reason, _model_cache(), LOCAL_MODELS, cached))
    if reason != SWITCHED_OFF:
        _tell_once(f"{reason}; {hub_id} is read from the cache")
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelError(explain_failure(f"{hub_id} (revision {revision or 'main'})", error)) from error


@lru_cache(maxsize=16)
def _tell_once(line: str) -> None:
    tell(line)


def hub_silence() -> str:
    """Why the hub cannot be asked, in words; empty if it can."""
    from huggingface_hub import constants  # a run from local files has no need of it

    if constants.HF_HUB_OFFLINE:
        return SWITCHED_OFF
    return _silence_of(constants.ENDPOINT, int(time.monotonic() / ANSWER_LASTS_SECONDS))


@lru_cache(maxsize=1)
def _silence_of(endpoint: str, period: int) -> str:
    answer = _Probe(endpoint)
    answer.start()
    answer.join(PROBE_SECONDS)  # the client's own time limit does not cover the look-up of the name
    if not answer.problem:
        return ""
    return f"{endpoint} does not answer ({answer.problem})"


class _Probe(threading.Thread):
    """Asks the hub's front page for its headers. `problem` is empty once anything but a broken server has answered."""

    def __init__(self, endpoint: str):
        super().__init__(daemon=True, name="steep-hub-probe")
        self._endpoint = endpoint
        self.problem = f"not within {PROBE_SECONDS:.0f} seconds"

    def run(self) -> None:
        from huggingface_hub.utils import get_session  # as above

        try:
            status = get_session().head(self._endpoint, timeout=PROBE_SECONDS).status_code
        except Exception as error:  # noqa: BLE001  (a user's own client may raise anything; it is said)
            self.problem = first_line(error)
            return
        self.problem = f"status {status}" if status >= 500 else ""  # those the libraries try again and again


def _model_cache() -> Path:
    from huggingface_hub import constants  # as above

    return Path(constants.HF_HUB_CACHE)


def cached_ids(files: Sequence[str] = MODEL_FILES) -> list[str]:
    """The ids of models of which the cache holds one of `files`, sorted."""
    folders = sorted(_model_cache().glob("models--*"))
    return [
        folder.name.removeprefix("models--").replace("--", "/")
        for folder in folders
        if any(next(folder.glob(f"snapshots/*/{name}"), None) for name in files)
    ]


def not_at_hand(hub_id: str, reason: str, cache: Path, local: str, cached: Sequence[str], fetch: str = "") -> str:
    """The message about an id that is neither here nor to be had.

    reason: from `hub_silence`. cache: where it was looked for. local: what works without a hub. cached: the ids in the cache.
    fetch: more arguments of the command that fetches it.
    """
    near = get_close_matches(hub_id, cached, n=MOST_NAMED_IDS, cutoff=0.0)
    more = f" and {len(cached) - len(near)} more" if len(cached) > len(near) else ""
    ids = f"an id in the cache: {', '.join(near)}{more}" if near else "nothing in the cache can be used instead"
    return (
        f"{hub_id} is not in this folder and not in the cache ({cache}), and {reason}.\n"
        f"  What works: {local}; {ids}.\n"
        f"  Where the hub answers, hf download {hub_id}{fetch} fetches it; with --local-dir FOLDER, into a folder to copy."
    )


def explain_failure(hub_id: str, error: BaseException) -> str:
    """The message for an id that a library could not load; its own may be many lines about a network known to be away."""
    reason = hub_silence()
    if not reason:
        return (
            f"{hub_id!r} is neither a local path nor found on the hub or in its cache. Give {LOCAL_MODELS}, or a hub id that "
            f"is reachable or cached. ({first_line(error)})"
        )
    return (
        f"{hub_id}: the cache does not hold all that is needed, and {reason}.\n"
        f"  What works: {LOCAL_MODELS}; or complete the cache where the hub can be reached: hf download {hub_id}"
    )
