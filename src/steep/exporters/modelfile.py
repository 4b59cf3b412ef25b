"""An Ollama Modelfile: where the weights are, how a conversation becomes text, and where an answer ends.

Ollama formats conversations with Go templates, a tokenizer with a Jinja template. The family is found by behaviour: a known one
is used if its turns, joined, are exactly what the tokenizer's own template gives for the same conversation. Without a family
there is no chat template, and the model continues the text it is given. Weakness: tools and images are left out.
Source: Ollama's docs/modelfile.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steep.core.errors import ModelError
from steep.core.say import Say

RAW_TEMPLATE = "{{ .Prompt }}"
LARGEST_CONTEXT = 8192
"""Largest num_ctx that is written; more is the person's choice, since Ollama reserves the memory for it at the start."""


@dataclass(frozen=True)
class ChatFamily:
    """How turns are written: role -> the text before and after the content; and the text that begins an answer."""

    turns: Mapping[str, tuple[str, str]]
    answer: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation up to the beginning of the next answer."""
        turns = ((*self.turns[message["role"]], message["content"]) for message in messages)
        return "".join(before + content + after for before, after, content in turns) + self.answer

    def go_template(self) -> str:
        """The same as a Go template. A system message is written like a user's where the family has none."""
        turns = {"system": self.turns["user"], **self.turns}
        branches = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for number, (role, (before, after)) in enumerate(turns.items())
        ]
        return "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + self.answer


def _headed(before: str, after: str, end: str, assistant: str = "assistant") -> ChatFamily:
    names = {"system": "system", "user": "user", "assistant": assistant}
    turns = {role: (before + name + after, end) for role, name in names.items()}
    return ChatFamily(turns, before + assistant + after)


CHAT_FAMILIES = {
    "chatml": _headed("<|im_start|>", "\n", "<|im_end|>\n"),
    "llama3": _headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "phi3": _headed("<|", "|>\n", "<|end|>\n"),
    "zephyr": _headed("<|", "|>\n", "</s>\n"),
    "gemma": ChatFamily(
        {
            "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
            "assistant": ("<start_of_turn>model\n", "<end_of_turn>\n"),
        },
        "<start_of_turn>model\n",
    ),
    "mistral": ChatFamily({"user": ("[INST] ", " [/INST]"), "assistant": (" ", "</s>")}, ""),
}

CONVERSATION = (
    {"role": "system", "content": "Speak briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
)


def find_chat_family(hf_tokenizer: Any) -> tuple[str, ChatFamily] | None:
    """The family whose turns equal the tokenizer's own, with its name; None for an unknown template or none."""
    if not isinstance(hf_tokenizer.chat_template, str):
        return None
    for name, family in CHAT_FAMILIES.items():
        messages = [message for message in CONVERSATION if message["role"] in family.turns]
        if _own(hf_tokenizer, messages) == family.render(messages):
            return name, family
    return None


def default_system(hf_tokenizer: Any, family: ChatFamily) -> str | None:
    """The system message that the tokenizer's template adds where there is none; None if it adds none."""
    if "system" not in family.turns:
        return None
    user = [message for message in CONVERSATION if message["role"] == "user"][:1]
    written, bare = _own(hf_tokenizer, user), family.render(user)
    before, after = family.turns["system"]
    if written is None or not written.startswith(before) or not written.endswith(after + bare):
        return None
    return written[len(before) : len(written) - len(after + bare)]


def _own(hf_tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str | None:
    """The conversation in the tokenizer's own format, without BOS, which llama.cpp adds; None if the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = hf_tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except TemplateError:  # some templates raise for a system message
        return None
    bos = hf_tokenizer.bos_token
    return str(text.removeprefix(bos) if bos else text)


SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
            "repetition_penalty": "repeat_penalty"}  # fmt: skip
"""transformers' name -> Ollama's."""


def number(value: Any, name: str) -> str:
    """A sampling setting as Ollama reads it. Raises ModelError for what is no number: its text could be a line of its own."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ModelError(
            f"generation_config.json sets {name} to {value!r:.80}, and a number is needed; correct it or delete it"
        )
    return repr(value)


def quoted(text: str) -> str:
    """A text of a stranger's tokenizer on one line, in quotes. Raises ModelError for one that would end either."""
    if '"' in text or any(ord(letter) < 32 for letter in text):
        raise ModelError(
            f"{text!r:.80} ends a text, and a Modelfile cannot hold it: it has a quote or a control character"
        )
    return f'"{text}"'


def block(text: str) -> str:
    """A text of several lines, in three quotes. Raises ModelError for one that would end them."""
    if '"""' in text or text.endswith('"'):
        raise ModelError(
            'the chat template or its system message has """ in it or ends with a quote; a Modelfile cannot hold that'
        )
    return f'"""{text}"""'


def modelfile(
    weights: str,
    hf_tokenizer: Any,
    generation: Mapping[str, Any],
    eos_ids: Sequence[int],
    context_length: int,
    say: Say,
) -> str:
    """The Modelfile; which template it has is said. weights: the .gguf file beside it.

    generation: what the model's generation_config sets. eos_ids: every id that ends a text.
    """
    found = find_chat_family(hf_tokenizer)
    template = RAW_TEMPLATE if found is None else found[1].go_template()
    lines = [f"FROM ./{weights}", f"TEMPLATE {block(template)}"]
    stops = [hf_tokenizer.convert_ids_to_tokens(number) for number in eos_ids]
    if found is not None:
        system = default_system(hf_tokenizer, found[1])
        lines += [f"SYSTEM {block(system)}"] if system else []
        stops.append(found[1].turns["assistant"][1].strip())
    lines += [f"PARAMETER stop {quoted(stop)}" for stop in dict.fromkeys(stops) if stop]
    lines += [
        f"PARAMETER {theirs} {number(generation[ours], ours)}"
        for ours, theirs in SAMPLING.items()
        if generation.get(ours) is not None
    ]
    lines.append(f"PARAMETER num_ctx {min(context_length, LARGEST_CONTEXT)}")
    if found is not None:
        said = f"TEMPLATE is {found[0]}, which formats a conversation exactly like the tokenizer's chat template"
    elif isinstance(hf_tokenizer.chat_template, str):
        said = "the tokenizer's chat template is of no known family, so TEMPLATE is raw: the model continues the text it is given"
    else:
        said = "the tokenizer has no chat template, so TEMPLATE is raw: the model continues the text it is given"
    say(f"Modelfile: {said}")
    return "\n".join(lines) + "\n"
