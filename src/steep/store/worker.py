"""A worker process of `prepare`: work items in on standard input, progress out on standard output, both JSON lines.

Started as a separate program rather than with multiprocessing, so that the caller's main module is not imported again:
`prepare` works from a notebook or a script without a main guard, and a worker never imports torch or transformers.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from functools import partial
from typing import Any

from steep.core.errors import SteepError
from steep.store.manifest import TOKENIZER_FOLDER
from steep.store.shard_work import Preparation, process_item
from steep.store.work import WorkItem
from steep.tokenizer.encode import TextTokenizer


def main() -> None:
    """Work until standard input ends. Ends at once when the parent closes it or dies."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the messages

    def send(**message: Any) -> None:
        channel.write(json.dumps(message) + "\n")

    def send_progress(number: int, done_bytes: int, tokens: int) -> None:
        send(progress=[number, done_bytes, tokens])

    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    try:
        preparation = Preparation.from_json(json.loads(lines.get()))
        tokenizer = TextTokenizer.load(preparation.out / TOKENIZER_FOLDER)
        while True:
            item = WorkItem.from_json(json.loads(lines.get()))
            process_item(preparation, item, tokenizer, partial(send_progress, item.number))
            send(finished=item.number)
    except SteepError as error:
        send(error=type(error).__name__, message=str(error))
    except BaseException:  # noqa: BLE001  (sent to the parent, which raises it)
        send(error="defect", message=traceback.format_exc())
        os._exit(1)  # the parent raises it; printed here too, it would appear twice


def _read_lines(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)
