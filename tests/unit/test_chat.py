"""`steep chat`: turns become ids by the model's own template, old ones make room, and the command talks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steep.core.errors import ModelError
from steep.serving.conversation import Conversation
from steep.tokenizer.config import TokenizerConfig
from steep.tokenizer.open import text_tokenizer
from support import LLAMA

TEMPLATE = (
    "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer_directory)


def conversation(
    tokenizer: Any, template: str | None, room: int | None, said: list[str], system: str = ""
) -> Conversation:
    tokenizer.chat_template = template
    return Conversation(text_tokenizer(tokenizer, TokenizerConfig(), "tiny"), tokenizer, room, said.append, system)


def test_turns_are_what_the_template_of_transformers_writes(tokenizer: Any) -> None:
    talk = conversation(tokenizer, TEMPLATE, None, [], system="Be brief.")
    talk.ask("one")
    talk.answered("two")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert talk.talks
    assert talk.ask("three") == expected
    assert expected.count(0) == 4  # the special tokens that the template writes are special tokens
    talk.forget()
    assert talk.ask("three") == tokenizer.apply_chat_template(
        [messages[0], messages[3]], add_generation_prompt=True, return_dict=False
    )


def test_without_a_template_text_is_completed_and_markers_in_it_are_text(tokenizer: Any) -> None:
    talk = conversation(tokenizer, None, None, [])
    assert not talk.talks
    ids = talk.ask("a <|endoftext|> b")
    assert 0 not in ids
    assert tokenizer.decode(ids) == "a <|endoftext|> b"
    talk.answered("c")
    assert talk.ask("d") == talk.ask("d")  # nothing is remembered


def test_the_oldest_turns_make_room_and_it_is_said(tokenizer: Any) -> None:
    said: list[str] = []
    talk = conversation(tokenizer, TEMPLATE, 40, said)
    for _ in range(6):
        assert len(talk.ask("some words to remember")) <= 40
        talk.answered("some more")
    assert said
    assert all("left out, since the model's positions are full" in line for line in said)
    expected = conversation(tokenizer, TEMPLATE, 40, []).ask("short")
    talk.forget()
    with pytest.raises(ModelError, match="there is room for 40; shorten it"):
        talk.ask("word " * 60)
    assert talk.ask("short") == expected  # what was refused is no turn


def test_a_template_that_refuses_a_system_message_is_explained(tokenizer: Any) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
    )
    talk = conversation(tokenizer, template, None, [], system="Be brief.")
    with pytest.raises(ModelError, match="does not take a --system message: System role not supported"):
        talk.ask("one")
    assert conversation(tokenizer, template, None, []).ask("one")


def test_the_command_completes_and_leaves(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA)).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "steep", "chat", str(tmp_path), "--max-new-tokens", "4", "--temperature", "0"],
        input="The with statement\n\n/new\n/exit\nnever read\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "has no chat template, so it completes" in done.stdout
    assert "The with statement" in done.stdout
    assert "never read" not in done.stdout
