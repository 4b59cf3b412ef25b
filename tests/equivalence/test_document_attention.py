"""Packed documents against the same documents alone in the untouched transformers model, family by family."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from steep.batch import Batch
from steep.core.errors import ModelError, TrainingError
from steep.core.say import tell
from steep.models.attention_choice import (
    check_causal,
    check_decomposition,
    leak_test,
    prepare_lm_loss,
    recorded_choice,
)
from steep.models.document_attention import attend_documents
from steep.models.gpt2 import build_gpt2_model
from steep.models.lm_loss import LMLoss, read_head

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LENGTHS = [11, 1, 12, 5, 5, 5, 9, 24]
"""Documents of three rows of 24 tokens: longer and shorter than the window of 6, equal ones in a run, one of one token."""

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral_window": ("Mistral", {"sliding_window": 6}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("GPT2", None),
    "cohere": ("Cohere", {"logit_scale": 0.3}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": 4}),
    "gpt_oss": ("GptOss", {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

EAGER = ("gemma2", "gpt_oss")
"""Families whose soft caps and sinks transformers computes with eager attention only."""


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "steep_gpt2":
        return build_gpt2_model(VOCAB, 64, 32, 2, 4, initializer_range=0.2, seed=0)
    name, extra = FAMILIES[family]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_name)(**(GPT2_SIZES if extra is None else {**SIZES, **extra}))
    return getattr(transformers, f"{name}ForCausalLM" if extra is not None else "GPT2LMHeadModel")(config).eval()


def make_batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (3, 24), generator=generator)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    labels = ids.flatten().roll(-1)
    labels[bounds[1:] - 1] = -100
    return Batch(
        input_ids=ids, labels=labels.view(3, 24),
        position_ids=torch.cat([torch.arange(length) for length in LENGTHS]).view(3, 24),
        cu_seqlens=bounds.to(torch.int32), max_seqlen=max(LENGTHS), source_ids=torch.zeros(3, dtype=torch.int32),
    )  # fmt: skip


def alone(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits (72, V) of each document by itself, through the model's own untouched forward (eager for soft caps)."""
    parts = []
    for document in batch.input_ids.flatten().split(LENGTHS):
        output = model(document.unsqueeze(0))
        parts.append(getattr(output, "logits", output)[0])
    return torch.cat(parts)


@pytest.fixture(params=[*FAMILIES, "steep_gpt2"])
def family(request) -> str:
    return request.param


def test_packed_logits_equal_each_document_alone(family):
    model, batch = build(family), make_batch()
    untouched = copy.deepcopy(model)
    if family in EAGER:
        untouched.set_attn_implementation("eager")
    with torch.no_grad():
        expected = alone(untouched, batch)
        messages: list[str] = []
        lm_loss = prepare_lm_loss(model, messages.append)
        assert (lm_loss.attention, lm_loss.has_head, messages) == ("document", True, [])
        torch.testing.assert_close(lm_loss.own_logits(batch), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            read_head(model).logits(lm_loss.hidden_states(batch)), expected, rtol=1e-4, atol=1e-5
        )


def test_loss_and_gradients_equal_the_model_alone(family):
    model, batch = build(family).train(), make_batch()
    untouched = copy.deepcopy(model)
    if family in EAGER:
        untouched.set_attn_implementation("eager")
    for module in (*model.modules(), *untouched.modules()):  # GPT-2's own dropout draws differ between the two ways
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lm_loss = prepare_lm_loss(model, tell, chunk_bytes=10 * VOCAB * 4)
    loss, losses_B, _ = lm_loss(batch)
    torch.testing.assert_close(losses_B.sum(), loss.detach())
    loss.backward()
    expected = torch.nn.functional.cross_entropy(
        alone(untouched, batch), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for (name, mine), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=2e-4, msg=name)
    losses = lm_loss.token_losses(batch)
    torch.testing.assert_close(losses.sum(), expected.detach(), rtol=1e-5, atol=1e-4)
    assert torch.equal(losses == 0, batch.labels == -100)


def test_changing_one_document_changes_no_bit_of_another(family):
    lm_loss = prepare_lm_loss(build(family).eval(), tell)
    batch = make_batch()
    changed = make_batch()
    changed.input_ids.view(-1)[12:24] = (changed.input_ids.view(-1)[12:24] + 1) % VOCAB
    with torch.no_grad():
        before, after = lm_loss.own_logits(batch), lm_loss.own_logits(changed)
    others = torch.ones(72, dtype=torch.bool)
    others[12:24] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])
    leak_test(lm_loss)


def test_generation_with_left_padding_equals_the_untouched_model():
    """Without cu_seqlens the attention is transformers' own, masks and cache included."""
    model = build("llama")
    untouched = copy.deepcopy(model)
    prepare_lm_loss(model, tell)
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), untouched.generate(ids, **settings))


@pytest.mark.parametrize("wished", ["sdpa", "eager"])
def test_transformers_own_attention_with_restarting_positions(wished):
    model, batch = build("llama"), make_batch()
    expected = alone(copy.deepcopy(model), batch)
    messages: list[str] = []
    lm_loss = prepare_lm_loss(model, messages.append, attention=wished)
    assert (lm_loss.attention, messages) == (wished, [])
    torch.testing.assert_close(lm_loss.own_logits(batch), expected, rtol=1e-4, atol=1e-5)


STATE_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def jamba(**changes) -> nn.Module:
    """A hybrid: one layer with a recurrent state, one with attention."""
    torch.manual_seed(0)
    sizes = {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2,
        "use_mamba_kernels": False, **changes,
    }  # fmt: skip
    return transformers.JambaForCausalLM(transformers.JambaConfig(**STATE_SIZES, **sizes)).eval()


def bloom() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    return transformers.BloomForCausalLM(config).eval()


def roberta() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, is_decoder=True, max_position_embeddings=32, initializer_range=0.2, pad_token_id=3, **sizes
    )
    return transformers.RobertaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "build_model",
    [jamba, bloom, roberta],
    ids=["carries state", "no form for packed documents", "positions of its own"],
)
def test_documents_in_rows_of_their_own_equal_each_document_alone(build_model):
    model, batch, messages = build_model(), make_batch(), []
    untouched = copy.deepcopy(model)
    lm_loss = prepare_lm_loss(model, messages.append)
    assert lm_loss.apart
    assert "documents: each is run as a row of its own" in messages[0]
    assert "data.document_mask: false" in messages[0]
    with torch.no_grad():
        torch.testing.assert_close(lm_loss.own_logits(batch), alone(untouched, batch), rtol=1e-4, atol=1e-5)
    lm_loss(batch)[0].backward()
    expected = torch.nn.functional.cross_entropy(
        alone(untouched, batch), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    expected.backward()
    for (name, mine), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=2e-4, msg=name)
    leak_test(lm_loss)
    check_causal(lm_loss)
    with pytest.raises(ModelError, match=r"model\.attention=document"):
        prepare_lm_loss(model, tell, attention="document")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_is_no_reason_to_run_documents_apart(frozen, dtype):
    """Norms give fp32 numbers that half-precision products have rounded; frozen weights may be in half precision themselves."""
    torch.manual_seed(0)
    model = build("llama")
    if frozen:  # as with an adapter and trained embeddings
        model.to(dtype).model.embed_tokens.float()
    messages: list[str] = []
    with torch.autocast("cpu", dtype):
        lm_loss = prepare_lm_loss(model, messages.append)
        leak_test(lm_loss)
    assert lm_loss.attention == "document", messages
    assert not lm_loss.apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_through_small_weights_is_seen(dtype):
    """A fresh hybrid moves the outputs of the next document by less than rounding does, and would leak once it is trained."""
    model = jamba(initializer_range=1e-4).to(dtype)
    batch, changed = make_batch(), make_batch()
    changed.input_ids[0, :11] = 3
    packed = LMLoss(model, "sdpa", has_head=True)
    with torch.no_grad():
        before, after = packed.own_logits(batch)[11:24], packed.own_logits(changed)[11:24]
    assert (before - after).abs().max() < 1e-3 * before.abs().max()
    with pytest.raises(TrainingError, match="data.document_mask to false"):
        leak_test(packed)


def test_a_resumed_run_takes_the_choice_that_it_began_with():
    messages: list[str] = []
    began = prepare_lm_loss(jamba(), tell)
    record = recorded_choice(began, "auto")
    later = prepare_lm_loss(jamba(), messages.append, recorded=record)
    assert (later.attention, later.apart, later.has_head, messages) == (began.attention, True, began.has_head, [])
    leaking = {**record, "apart": False}  # a choice that no test would pass
    assert not prepare_lm_loss(jamba(), tell, recorded=leaking).apart
    assert prepare_lm_loss(jamba(), tell, attention="eager", recorded=leaking).apart  # another wish is a new choice


def test_a_model_that_sees_later_tokens_is_refused():
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    for is_decoder in (False, True):
        model = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=is_decoder))
        lm_loss = prepare_lm_loss(model, tell)
        if is_decoder:
            check_causal(lm_loss)
        else:
            with pytest.raises(ModelError, match="sees later tokens .* is_decoder: true"):
                check_causal(lm_loss)


class ScaledHead(nn.Module):
    """A foreign model: logits only, and not its layer applied to any hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens)) * 2


def test_a_foreign_model_is_trained_on_its_own_whole_logits():
    model, batch = ScaledHead(), make_batch()
    messages: list[str] = []
    lm_loss = prepare_lm_loss(model, messages.append, vocab_size=VOCAB)
    assert (lm_loss.attention, lm_loss.has_head) == ("own", False)
    assert any("whole logits" in message for message in messages)
    expected = torch.nn.functional.cross_entropy(
        model(batch.input_ids).flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(lm_loss(batch)[0], expected)
    torch.testing.assert_close(lm_loss.token_losses(batch).sum(), expected)


def test_a_head_that_config_does_not_describe_is_noticed():
    model = build("granite")
    assert check_decomposition(LMLoss(model, "sdpa", has_head=True)) is None
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert "not its output layer applied" in check_decomposition(LMLoss(model, "sdpa", has_head=True))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_equals_one_masked_softmax(window, softcap, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(20, kv_heads, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    cu_seqlens = torch.tensor([0, 7, 8, 12, 16, 20], dtype=torch.int32)
    document = torch.bucketize(torch.arange(20), cu_seqlens[1:].long(), right=True)
    distance = torch.arange(20)[:, None] - torch.arange(20)[None, :]
    allowed = (document[:, None] == document[None, :]) & (distance >= 0) & (distance < (window or 99))
    scores = torch.einsum("qnh,knh->nqk", q, k.repeat_interleave(4 // kv_heads, 1)) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    expected = torch.einsum("nqk,knh->qnh", weights, v.repeat_interleave(4 // kv_heads, 1))
    ours = attend_documents(q, k, v, cu_seqlens, max_seqlen=7, scale=0.3, sliding_window=window, softcap=softcap)
    tolerance = 1e-6 if softcap is not None else 1e-12  # soft-capped softmax runs in fp32
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rounded_lengths_change_nothing(window, softcap):
    """In bf16 documents are padded for the kernel: outputs and gradients are those of fp32 on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, 7, 8, 40, 56, 89, 89, 250], dtype=torch.int32)
    tensors = [torch.randn(250, heads, 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    weights = torch.randn(250, 4, 8, generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        output = attend_documents(*inputs, bounds, max_seqlen=161, sliding_window=window, softcap=softcap)
        (output.float() * weights).sum().backward()
        found.append([output.float(), *(tensor.grad.float() for tensor in inputs)])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert (ours - expected).norm() < 0.01 * expected.norm()


def test_bf16_kernels_see_few_lengths(monkeypatch):
    """They keep memory for each, for good."""
    lengths = set()
    real = torch.nn.functional.scaled_dot_product_attention

    def see(query, *arguments, **keywords):
        lengths.add(query.shape[2])
        return real(query, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", see)
    for length in range(1, 1025, 3):
        q = torch.randn(length, 1, 8).bfloat16()
        attend_documents(q, q, q, torch.tensor([0, length], dtype=torch.int32), max_seqlen=length)
    assert len(lengths) <= 32
    assert {16, 32, 1024} <= lengths


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_varlen_kernel_equals_the_split_loop(window, kv_heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 4, 64, generator=generator)
    k, v = (torch.randn(20, kv_heads, 64, generator=generator) for _ in range(2))
    cu_seqlens = torch.tensor([0, 7, 8, 12, 16, 20], dtype=torch.int32)
    on_cpu = [tensor.to(torch.bfloat16).float().requires_grad_() for tensor in (q, k, v)]
    expected = attend_documents(*on_cpu, cu_seqlens, max_seqlen=20, sliding_window=window)
    weights = torch.randn(expected.shape, generator=generator)
    (expected * weights).sum().backward()
    on_device = [tensor.to("cuda", torch.bfloat16).requires_grad_() for tensor in (q, k, v)]
    ours = attend_documents(*on_device, cu_seqlens.cuda(), max_seqlen=20, sliding_window=window)
    torch.testing.assert_close(ours.float().cpu(), expected, rtol=3e-2, atol=3e-2)
    (ours * weights.cuda()).sum().backward()
    for tensor, reference in zip(on_device, on_cpu, strict=True):
        torch.testing.assert_close(tensor.grad.float().cpu(), reference.grad, rtol=3e-2, atol=3e-2)
