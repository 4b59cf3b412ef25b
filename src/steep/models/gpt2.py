"""GPT-2 in plain PyTorch under the parameter names and shapes of transformers' GPT-2.

In: sizes. Out: a module whose state dict loads into transformers' GPT2LMHeadModel with equal logits, and back. Main choice:
linear layers keep GPT-2's transposed `Conv1D` layout, weight (in, out), so that no name or shape is translated between training
and export. Source: Radford et al. 2019; initialisation as in the released code. Suffixes: B sequences, T tokens, D width, N
heads, H head size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steep.core.errors import ModelError
from steep.core.files import write_json
from steep.models.document_attention import ATTENTION_NAME, attend_documents

INIT_STD = 0.02
"""Standard deviation of fresh weights: openai/gpt-2, src/model.py."""


@dataclass
class GPT2Config:
    """The sizes of a GPT-2, under transformers' names. Dropout defaults to 0: see build_gpt2_model."""

    vocab_size: int
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = INIT_STD
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    use_cache: bool = True
    activation_function: str = "gelu_new"
    model_type: str = "gpt2"
    architectures: list[str] = field(default_factory=lambda: ["GPT2LMHeadModel"])
    dtype: str = "float32"

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads."""
        return asdict(self)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json into `directory`, which must exist."""
        write_json(Path(directory) / "config.json", self.to_dict())

    # The names under which transformers' code and steep's ask any configuration. Without annotations, so that they are no fields.
    _attn_implementation = ATTENTION_NAME
    max_position_embeddings = property(lambda self: self.n_positions)
    hidden_size = property(lambda self: self.n_embd)
    num_hidden_layers = property(lambda self: self.n_layer)
    num_attention_heads = property(lambda self: self.n_head)


def build_gpt2_model(
    vocab_size: int,
    n_positions: int = 1024,
    n_embd: int = 768,
    n_layer: int = 12,
    n_head: int = 12,
    n_inner: int | None = None,
    dropout: float = 0.0,
    layer_norm_epsilon: float = 1e-5,
    initializer_range: float = INIT_STD,
    tie_word_embeddings: bool = True,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
) -> GPT2LMHeadModel:
    """A GPT-2 with fresh fp32 weights; the defaults are GPT-2 small (124M parameters at vocab_size 50,257).

    n_positions: longest sequence in tokens. n_inner: feed-forward width, default 4 * n_embd. seed: the weights are a
    function of it alone; None draws from torch's global generator.
    dropout: of embeddings, attention and residuals. 0 by default, unlike transformers' 0.1: in pretraining each token is
    seen about once, so there is no overfitting to prevent, and dropout costs time and quality.
    Raises ModelError for invalid sizes.
    """
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=n_positions, n_embd=n_embd, n_layer=n_layer, n_head=n_head, n_inner=n_inner,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, layer_norm_epsilon=layer_norm_epsilon,
        initializer_range=initializer_range, tie_word_embeddings=tie_word_embeddings,
        bos_token_id=bos_token_id, eos_token_id=eos_token_id,
    )  # fmt: skip
    _check_sizes(config)
    if seed is None:
        return GPT2LMHeadModel(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _check_sizes(config: GPT2Config) -> None:
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if (size := getattr(config, name)) < 1:
            raise ModelError(f"{name}={size} must be at least 1")
    width, wanted, dropout = config.n_embd, config.n_head, config.resid_pdrop
    if width % wanted:
        fits = [heads for heads in range(1, width + 1) if width % heads == 0]
        nearest = sorted(sorted(fits, key=lambda heads: abs(heads - wanted))[:3])
        raise ModelError(
            f"n_embd={width} is not a multiple of n_head={wanted}; these fit: {', '.join(map(str, nearest))}"
        )
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout={dropout} must be at least 0 and below 1")


class Conv1D(nn.Module):
    """A linear layer in GPT-2's layout: weight (in, out), y = x @ weight + bias."""

    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_inputs, num_outputs))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)  # bias + x @ weight
        return flat.view(*x.shape[:-1], flat.shape[-1])


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and the tokens before it in the same document."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """cu_seqlens, max_seqlen: see GPT2LMHeadModel.forward; without them each row is one document."""
        batch, length, width = x_BTD.shape
        q, k, v = self.c_attn(x_BTD).view(batch, length, 3, self.n_head, width // self.n_head).unbind(2)
        dropout = self.dropout if self.training else 0.0
        if cu_seqlens is None:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out_BNTH = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            out_BTNH = out_BNTH.transpose(1, 2)
        else:
            q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
            out_BTNH = attend_documents(q, k, v, cu_seqlens, max_seqlen=max_seqlen or length, dropout=dropout)
        return self.resid_dropout(self.c_proj(out_BTNH.reshape(batch, length, width)))


class MLP(nn.Module):
    """Feed-forward layer with GPT-2's tanh form of GELU."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = 4 * config.n_embd if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(config.n_embd, inner)
        self.c_proj = Conv1D(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh")))


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward layers, each added to the residual stream."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D). cu_seqlens, max_seqlen: see GPT2LMHeadModel.forward."""
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD), cu_seqlens, max_seqlen)
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT2Model(nn.Module):
    """Embeddings, blocks and the final norm: token ids to hidden states."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_positions = config.n_positions
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, D) hidden states after the final norm. See GPT2LMHeadModel.forward."""
        if attention_mask is not None and cu_seqlens is None:
            raise ModelError("steep's GPT-2 does not read attention_mask; pass cu_seqlens to separate documents")
        length = input_ids.shape[1]
        if position_ids is None:
            if length > self.n_positions:
                raise ModelError(f"a sequence of {length:,} tokens: this model has {self.n_positions:,} positions")
            position_ids = torch.arange(length, device=input_ids.device).unsqueeze(0)
        x_BTD = self.drop(self.wte(input_ids) + self.wpe(position_ids))
        for block in self.h:
            x_BTD = block(x_BTD, cu_seqlens, max_seqlen)
        return self.ln_f(x_BTD)


class GPT2LMHeadModel(nn.Module):
    """GPT-2 with its output head, tied to the token embedding unless the configuration says otherwise.

    It is called like a transformers model with document attention: with one flattened row of documents.
    """

    _supports_attention_backend = True  # transformers' mark of a model whose attention can be set

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # normal weights; projections into the residual stream divided by sqrt(2 * layers); biases are 0 as made
        std = config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * config.n_layer))
            elif parameter.ndim >= 2:
                nn.init.normal_(parameter, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @property
    def base_model(self) -> GPT2Model:
        """The model without its output head."""
        return self.transformer

    def set_attn_implementation(self, name: str) -> None:
        """Raises ModelError for any attention except document attention."""
        if name != ATTENTION_NAME:
            raise ModelError(f"model.attention={name}: steep's GPT-2 computes document attention only; use auto")

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        max_seqlen: int | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """logits (B, T, V); with labels (B, T), the pair (logits, mean loss).

        input_ids: (B, T) int64. position_ids: (B, T), default 0..T-1 in each row. cu_seqlens: (documents + 1,) int32
        boundaries over the B*T flattened tokens: attention stays inside a document. max_seqlen: no document is longer.
        attention_mask, use_cache: part of the call of transformers' models; not read.
        labels: (B, T), already shifted: labels[b, t] is the target AT position t, -100 where there is none.
        """
        hidden_BTD = self.transformer(input_ids, position_ids, cu_seqlens, max_seqlen, attention_mask)
        logits_BTV = self.lm_head(hidden_BTD)
        if labels is None:
            return logits_BTV
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels.flatten())

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding."""
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Linear:
        """The output head."""
        return self.lm_head

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors, from which AutoModelForCausalLM.from_pretrained loads this model."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]  # the same tensor as transformer.wte.weight
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(directory)
