"""Every causal family of the installed transformers, as the page "tried with" says; several minutes."""

from __future__ import annotations

import pytest
import transformers

from families.page import PAGE, row_of, try_all
from families.trial import families


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


@pytest.mark.heavy
def test_every_family_does_what_its_line_says() -> None:
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__} " not in page:
        pytest.skip(f"the page was written with another transformers than {transformers.__version__}")
    lines = page.splitlines()
    other = [row for pair in try_all(families()) if (row := row_of(pair)) not in lines]
    assert not other, f"{len(other)} families do something else (write the page again?):\n" + "\n".join(other)
