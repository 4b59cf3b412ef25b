"""What has been said so far, as the ids that a model continues. In: a tokenizer of transformers, turns. Out: ids.

A model with a chat template talks: its template writes the turns, roles and markers. One without completes: each text is
continued by itself, as in pretraining. Where the turns fill the model's positions, the oldest are left out, and a line says so.
"""

from __future__ import annotations

from typing import Any

from steep.core.errors import ModelError
from steep.core.say import Say
from steep.core.units import counted
from steep.tokenizer.encode import TextTokenizer


class Conversation:
    """The turns between a person and a model."""

    def __init__(
        self, tokenizer: TextTokenizer, hf_tokenizer: Any, room_tokens: int | None, say: Say, system: str = ""
    ):
        """room_tokens: what the model's positions leave for the prompt; None for no limit. system: the first message, if any."""
        self._tokenizer, self._hf_tokenizer = tokenizer, hf_tokenizer
        self._room_tokens, self._say = room_tokens, say
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    @property
    def talks(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self._hf_tokenizer, "chat_template", None))

    def ask(self, text: str) -> list[int]:
        """The ids that the model continues to answer `text`.

        Raises ModelError if even `text` alone leaves no room, or the template refuses the turns; then nothing has been said.
        """
        if not self.talks:
            return self._within(self._plain(text))
        turns = [*self._turns, {"role": "user", "content": text}]
        while not self._fits(ids := self._templated(turns)) and len(turns) > 1:
            turns = turns[2:]
        ids = self._within(ids)
        if left_out := len(self._turns) + 1 - len(turns):
            self._say(f"(left out, since the model's positions are full: the first {counted(left_out, 'message')})")
        self._turns = turns
        return ids

    def answered(self, text: str) -> None:
        """Take the model's answer as its turn."""
        if self.talks:
            self._turns.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Begin anew, with the system message."""
        self._turns.clear()

    def _templated(self, turns: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError  # transformers imports it for a template alone

        try:
            text = self._hf_tokenizer.apply_chat_template(
                [*self._system, *turns], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            roles = "a --system message" if self._system else "these messages"
            raise ModelError(f"the model's chat template does not take {roles}: {error}") from error
        # The template has written every special token itself.
        ids: list[int] = self._hf_tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _plain(self, text: str) -> list[int]:
        ids = list(self._tokenizer.encode(text))
        if self._tokenizer.prepend_bos and self._tokenizer.bos_id is not None:
            ids = [self._tokenizer.bos_id, *ids]
        return ids

    def _fits(self, ids: list[int]) -> bool:
        return self._room_tokens is None or len(ids) <= self._room_tokens

    def _within(self, ids: list[int]) -> list[int]:
        if not self._fits(ids):
            raise ModelError(
                f"this text has {len(ids):,} tokens and there is room for {self._room_tokens:,}; shorten it"
            )
        return ids
