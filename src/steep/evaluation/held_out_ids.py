"""The first tokens of a run's held-out texts, where they still exist: input on which two programs are compared."""

from __future__ import annotations

import numpy as np

from steep.core.errors import DataError, SteepError
from steep.core.say import Say, say_nothing, tell
from steep.data.held_out_text import HeldOutText
from steep.data.open import open_run_data
from steep.evaluation.loaded_model import LoadedModel
from steep.evaluation.model_reference import config_of_run


def held_out_ids(loaded: LoadedModel, most_tokens: int, say: Say = tell) -> dict[str, list[int]]:
    """Per held-out text of the model's run the beginning of its first document of at least two tokens.

    Empty for a model outside a run. Where the run's stores are gone, nothing is prepared again; `say` is told.
    """
    if loaded.run is None:
        return {}
    try:
        data = open_run_data(config_of_run(loaded.run), loaded.tokenizer, say_nothing, progress=_refuse_to_prepare)
    except SteepError as error:
        say(f"the run's held-out texts are not compared: {error}")
        return {}
    found = {text.name: _beginning(text, most_tokens) for text in data.held_out_texts}
    return {name: ids for name, ids in found.items() if ids}


def _refuse_to_prepare(done_bytes: int, total_bytes: int, tokens: int) -> None:
    raise DataError("they would have to be prepared again")


def _beginning(text: HeldOutText, most_tokens: int) -> list[int]:
    for store, documents in text.parts:
        for document in documents.tolist():
            count = min(int(store.document_lengths[document]), most_tokens)
            if count >= 2:
                out = np.empty(count, dtype=np.int64)
                store.read(document, 0, count, out)
                return [int(number) for number in out]
    return []
