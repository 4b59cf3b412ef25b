"""Find the training documents that share a run of 13 words with an evaluation text.

In: evaluation texts, read like any source. Out: a sorted table of the hashes of all their runs of 13 words, in a file that
every worker maps; and for each training document the number of its runs in the table. Source of the measure: Brown et al.
2020, arXiv:2005.14165, appendix C. Memory: 10 bytes per word of the evaluation texts.
Weakness: evaluation documents of fewer than 13 words (they are counted) and paraphrases cannot be found.
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from steep.core.arrays import write_array
from steep.core.errors import DataError
from steep.core.files import atomic_writer, read_json, write_json
from steep.sources.config import SourceConfig
from steep.sources.document import Document
from steep.sources.inputs import load_format
from steep.store.word_hashes import run_hashes, runs_within, word_hashes
from steep.store.work import gather_inputs

RUN_WORDS = 13
MOST_TEXTS = 2**16 - 1
TABLE_FILE = "evaluation_runs.npy"
DESCRIPTION_FILE = "evaluation_texts.json"
EVALUATION_DTYPE = np.dtype([("runs", "<u4"), ("text", "<u2")])
"""Of a training document: how many of its runs of 13 words occur in evaluation texts, and the number of the text that holds
the first of them."""
TABLE_DTYPE = np.dtype([("run", "<u8"), ("text", "<u2")])


def write_table(folder: Path, paths: list[str]) -> None:
    """Hash the runs of all evaluation texts into `folder`. Raises DataError if there is nothing to compare with."""
    sources = [SourceConfig(path=path) for path in paths]
    if len(paths) > MOST_TEXTS:
        raise DataError(f"{len(paths):,} evaluation texts were given; at most {MOST_TEXTS:,} are possible.")
    runs: list[list[np.ndarray]] = [[] for _ in paths]
    described: list[dict[str, Any]] = [{"text": path, "documents": 0, "too_short": 0, "rejected": 0} for path in paths]
    for file in gather_inputs(sources):
        number = file.source
        for record in load_format(file.format).read(file.path, sources[number]):
            if not isinstance(record, Document):
                described[number]["rejected"] += 1
                continue
            hashes = run_hashes(word_hashes(record.text), RUN_WORDS)
            described[number]["documents"] += 1
            described[number]["too_short"] += not len(hashes)
            runs[number].append(hashes)
    unusable = [entry["text"] for entry in described if entry["documents"] == entry["too_short"]]
    if unusable:
        raise DataError(
            f"{', '.join(unusable)}: holds no document of at least {RUN_WORDS} words to check against. Give texts, "
            "or JSONL or Parquet with a field `text` or `content`."
        )
    texts = np.repeat(np.arange(len(paths), dtype=np.uint16), [sum(map(len, hashes)) for hashes in runs])
    unique, first = np.unique(np.concatenate([*chain.from_iterable(runs)]), return_index=True)
    table = np.empty(len(unique), dtype=TABLE_DTYPE)  # each run once, sorted, with the first text that holds it
    table["run"], table["text"] = unique, texts[first]
    with atomic_writer(folder / TABLE_FILE) as table_file:
        write_array(table_file, table)
    write_json(folder / DESCRIPTION_FILE, described)


def read_descriptions(folder: Path) -> list[dict[str, Any]]:
    """What `write_table` noted of each evaluation text."""
    described: list[dict[str, Any]] = read_json(folder / DESCRIPTION_FILE)
    return described


class EvaluationRuns:
    """Looks up runs in the table that `write_table` wrote."""

    def __init__(self, folder: Path):
        table = np.load(folder / TABLE_FILE, allow_pickle=False)
        self._runs, self._texts = np.ascontiguousarray(table["run"]), table["text"]
        bits = min(26, max(16, (16 * len(table)).bit_length()))
        self._shift = np.uint64(64 - bits)
        self._may_hold = np.zeros(1 << bits, dtype=bool)  # the first bits rule out most runs
        self._may_hold[self._runs >> self._shift] = True

    def find(self, words: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(texts,) EVALUATION_DTYPE: what each text shares with the evaluation texts. words, counts: from
        `word_hashes_of`."""
        found = np.zeros(len(counts), dtype=EVALUATION_DTYPE)
        positions = runs_within(counts, RUN_WORDS)
        if not len(positions):
            return found
        runs = run_hashes(words, RUN_WORDS)[positions]
        likely = self._may_hold[runs >> self._shift]
        runs, positions = runs[likely], positions[likely]
        at = np.searchsorted(self._runs, runs)
        at[at == len(self._runs)] = 0
        is_hit = self._runs[at] == runs
        owners = np.repeat(np.arange(len(counts)), counts)[positions[is_hit]]
        found["runs"] = np.bincount(owners, minlength=len(counts))
        guilty, first = np.unique(owners, return_index=True)
        found["text"][guilty] = self._texts[at[is_hit]][first]
        return found
