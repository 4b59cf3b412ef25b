"""Every causal family of the installed transformers, as the page "tried with" says; several minutes."""

from __future__ import annotations

import pytest
import transformers

from families.page import PAGE, row_of, try_all
from families.trial import families, resume_fresh, workshop
from steep.core.errors import SteepError


@pytest.mark.slow
def test_one_family_of_each_kind_works() -> None:
    """Attention inside documents, layers that carry state, no form for packed documents, sinks, layers of several sizes."""
    failed = [
        f"{trial.family}, {trial.adapter}: {trial.refused or trial.crashed}"
        for pair in try_all(["llama", "mamba2", "jamba", "bloom", "opt", "gpt_oss", "gemma4_text"])
        for trial in pair
        if not trial.works
    ]
    assert not failed, "\n".join(failed)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["glm4", "gemma3n_text", "roberta", "cwm", "modernbert-decoder"])
def test_fresh_weights_resume_to_the_last_bit(family: str) -> None:
    """Families with a padding row that a word of the tokenizer has, with positions counted from the padding id, and with a
    configuration that demands a beginning of text (which this tokenizer lacks)."""
    with workshop() as (folder, tokenizer, store):
        resume_fresh(family, folder, tokenizer, store)


@pytest.mark.heavy
def test_fresh_weights_of_every_family_resume_to_the_last_bit() -> None:
    failed = []
    with workshop() as (folder, tokenizer, store):
        for family in families():
            try:
                resume_fresh(family, folder, tokenizer, store)
            except SteepError:
                continue  # such as encoder-decoders
            except Exception as error:  # noqa: BLE001 - whatever a family does, the others are tried
                failed.append(f"{family}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.heavy
def test_every_family_does_what_its_line_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip(f"the page was written with another transformers than {transformers.__version__}")
    lines = page.splitlines()
    other = [row for pair in try_all(families()) if (row := row_of(pair)) not in lines]
    assert not other, f"{len(other)} families do something else (write the page again?):\n" + "\n".join(other)
