"""Fixtures shared by all tests: a tiny tokenizer, a tiny corpus, tiny models; all made here, nothing downloaded."""

from __future__ import annotations

import os
import pydoc_data.topics
import signal
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are faster so, and a busy machine does not slow them down

for number in (signal.SIGINT, signal.SIGHUP):
    if (
        signal.getsignal(number) is signal.SIG_IGN
    ):  # under nohup or a shell's `&`; the programs that tests start would inherit it
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Real English text: the pages of the interpreter's own language reference, in a fixed order."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def tiny_tokenizer_directory(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """A byte-level BPE of 512 ids trained on the corpus, end of text `<|endoftext|>`, no beginning of text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus_directory(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """The corpus as a folder of text files, one document per file."""
    directory = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(documents):
        (directory / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return directory
