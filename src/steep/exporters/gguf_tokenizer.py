"""A transformers tokenizer as llama.cpp reads it: tokens, types, merges or scores, and the name of the rule that splits text.

llama.cpp has named rules for splitting text built in; the file holds only the name. The name is found from the rules in
tokenizer.json, and a tokenizer whose rule llama.cpp does not have is refused. Whether the ids are really equal is tested
afterwards on hard strings. Source of names and rules: llama.cpp `llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from steep.core.errors import ConfigError, ModelError
from steep.core.say import Say

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""tokenizer.ggml.token_type. Source: the GGUF specification."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+" + _LINES
QWEN2_SPLIT = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+" + _LINES
QWEN35_SPLIT = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + _LINES

RULES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2_SPLIT,), False): "gpt-2",
    (("digits", GPT2_SPLIT), False): "smollm",
    ((LLAMA3_SPLIT,), True): "llama-bpe",
    ((LLAMA3_SPLIT,), False): "smaug-bpe",
    ((QWEN2_SPLIT,), False): "qwen2",
    ((QWEN35_SPLIT,), False): "qwen35",
}
"""(splits in order, whether a whole word that is a token is used without merging) -> llama.cpp's name."""

KEEPS_ALL = (("Isolated", False), ("Isolated", True), ("Removed", True))
"""(behavior, invert) of a split whose matches become pieces; the rules cover every character, so inverted removal does that."""


@dataclass
class GgufTokenizer:
    """What a .gguf file records about its tokenizer."""

    kind: str
    """`gpt2` for byte-level BPE, `llama` for BPE as SentencePiece has it."""
    rule: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False


def describe_tokenizer(hf_tokenizer: Any, vocab_size: int, rule: str | None = None) -> GgufTokenizer:
    """The tokenizer for a model with `vocab_size` rows. rule: use this name (`--tokenizer-pre`).

    Raises ModelError for a tokenizer whose rule llama.cpp does not have.
    """
    rules = json.loads(hf_tokenizer.backend_tokenizer.to_str())
    kind = rules["model"].get("type")
    if kind != "BPE":
        raise ModelError(f"the tokenizer is a {kind}; a gguf file can be written for BPE tokenizers only")
    tokens, types = _tokens(hf_tokenizer, vocab_size, spaces=_is_sentencepiece(rules))
    if not _is_sentencepiece(rules):
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in rules["model"]["merges"]]
        return GgufTokenizer("gpt2", rule or _rule_of(rules), tokens, types, merges=merges)
    if rule is not None:
        raise ConfigError(f"--tokenizer-pre {rule}: this is a SentencePiece tokenizer, which has no such rule")
    scores, adds_space = _scores(rules["model"], tokens), _adds_space(rules)
    return GgufTokenizer("llama", "default", tokens, types, scores=scores, add_space_prefix=adds_space)


def _is_sentencepiece(rules: dict[str, Any]) -> bool:
    return bool(rules["model"].get("byte_fallback"))


def _tokens(hf_tokenizer: Any, vocab_size: int, spaces: bool) -> tuple[list[str], list[int]]:
    """Per row of the model its token and type; rows without a token are marked unused."""
    backend = hf_tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=True)
    highest = max(vocabulary.values())
    if highest >= vocab_size:
        raise ModelError(f"the tokenizer has a token with id {highest:,} and the model {vocab_size:,} rows")
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, NORMAL
        if spaces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[number] = BYTE
    for number, added in backend.get_added_tokens_decoder().items():
        types[number] = CONTROL if added.special else USER_DEFINED
        tokens[number] = added.content.replace("\u2581", " ") if spaces and not added.special else added.content
    if spaces and hf_tokenizer.unk_token_id is not None:
        types[hf_tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """llama.cpp joins the neighbours whose joint token has the highest score: minus the rank of its merge."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(pairs):
        rank.setdefault(left + right, number)
    last = float(-len(rank) - 1)
    return [float(-rank[token]) if token in rank else last for token in tokens]


def _adds_space(rules: dict[str, Any]) -> bool:
    parts = [*_flat(rules.get("normalizer"), "normalizers"), *_flat(rules.get("pre_tokenizer"), "pretokenizers")]
    if any(part["type"] == "Prepend" for part in parts):
        return True
    return any(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts)


def _rule_of(rules: dict[str, Any]) -> str:
    splits = _splits(rules)
    key = (splits, bool(rules["model"].get("ignore_merges")))
    if key in RULES:
        return RULES[key]
    known = ", ".join(sorted(set(RULES.values())))
    raise ModelError(
        f"the tokenizer splits text by an unknown rule ({json.dumps(rules.get('pre_tokenizer'))[:300]}), and llama.cpp must have "
        f"the rule built in. Known rules: {known}. If llama.cpp has this one under a name, give --tokenizer-pre NAME; the ids "
        "are still compared on hard strings"
    )


def _splits(rules: dict[str, Any]) -> tuple[str, ...]:
    """The splits of a byte-level tokenizer in order. A part that is not understood stays as its JSON, and so matches no rule."""
    found = []
    for part in _flat(rules.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            found += [GPT2_SPLIT] if part.get("use_regex", True) else []
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append("digits")
        elif part["type"] == "Split" and (part.get("behavior"), bool(part.get("invert"))) in KEEPS_ALL:
            found.append(part["pattern"].get("Regex", json.dumps(part["pattern"])))
        else:
            found.append(json.dumps(part))
    return tuple(found)


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def say_differences(hf_tokenizer: Any, say: Say) -> None:
    """Say what llama.cpp does differently from transformers with this tokenizer."""
    rules = json.loads(hf_tokenizer.backend_tokenizer.to_str())
    forms = [part["type"] for part in _flat(rules.get("normalizer"), "normalizers") if part["type"].startswith("NF")]
    if forms:
        say(f"the tokenizer converts text to {forms[0]} first, which llama.cpp does not: give it text in {forms[0]}")
    added = list(hf_tokenizer.backend_tokenizer.get_added_tokens_decoder().values())
    spaced = [token.content for token in added if not token.special and token.content.startswith(" ")]
    if spaced and not _is_sentencepiece(rules):
        say(
            f"transformers' reader of .gguf files does not find added tokens that begin with a space ({spaced[0]!r}), so only "
            "llama.cpp can verify the ids: give --verify-with"
        )
    stripped = [token.content for token in added if token.lstrip or token.rstrip or token.single_word]
    if stripped:
        say(f"llama.cpp does not treat the spaces around {', '.join(stripped[:3])} as part of the token")


def write_tokenizer(writer: Any, found: GgufTokenizer, hf_tokenizer: Any, eos_ids: list[int], adds_bos: bool) -> None:
    """The tokenizer's keys. eos_ids: every id that ends a text, the tokenizer's own first."""
    writer.add_tokenizer_model(found.kind)
    writer.add_tokenizer_pre(found.rule)
    writer.add_token_list([token.encode("utf-8") for token in found.tokens])
    writer.add_token_types(found.types)
    if found.kind == "llama":
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.add_space_prefix)
    else:
        writer.add_token_merges(found.merges)
    add_id = {"bos": writer.add_bos_token_id, "unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for name, add in add_id.items():
        number = getattr(hf_tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
    if eos_ids:
        writer.add_eos_token_id(eos_ids[0])
    if len(eos_ids) > 1:
        writer.add_eot_token_id(eos_ids[1])
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(False)
    if isinstance(hf_tokenizer.chat_template, str):
        writer.add_chat_template(hf_tokenizer.chat_template)
