"""Makes what run.yaml needs, from this Python installation only: text/ (one page per file) and tokenizer/.

The text is Python's own language reference. The tokenizer is a byte-level BPE of 2,048 ids trained on it, with
`<|endoftext|>` as its end of text, saved as a transformers folder.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"


def write_text(folder: Path) -> list[str]:
    """Write one file per page of the language reference, the lines of each paragraph joined; returns the pages."""
    folder.mkdir(exist_ok=True)
    pages = {name: re.sub(r"(?<=\S)\n(?=\S)", " ", page) for name, page in sorted(topics.items())}
    for name, page in pages.items():
        (folder / f"{name}.txt").write_text(page, encoding="utf-8")
    return list(pages.values())


def train_tokenizer(pages: list[str], folder: Path) -> None:
    """Train a byte-level BPE and save it where `tokenizer.pretrained` finds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pages, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(folder)


if __name__ == "__main__":
    pages = write_text(Path("text"))
    train_tokenizer(pages, Path("tokenizer"))
    print(f"text/: {len(pages)} files. tokenizer/: {VOCAB_SIZE} ids.")
