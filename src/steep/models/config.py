"""Configuration of the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Optional, Union

from pydantic import BeforeValidator, Field, model_validator

from steep.core.section import Section

QUANTIZING_PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao_int8": "torchao"}
"""How weights are quantized -> the package that does it."""


class FreezeConfig(Section):
    """Which parts of the model are not trained. The keys add up. The short forms `freeze: embeddings` and `freeze:
    [pattern, ...]` stand for `{embeddings: true}` and `{patterns: [...]}`."""

    embeddings: bool = False
    """The token and position embeddings, and the output head if it is tied to them."""
    first_layers: int = Field(default=0, ge=0)
    """Number of layers, counted from the embeddings."""
    last_layers: int = Field(default=0, ge=0)
    """Number of layers, counted from the output head."""
    patterns: list[str] = Field(default_factory=list)
    """Parameter names, with wildcards `*` and `?`: `*.mlp.*`, `lm_head.weight`. A pattern without a match is an error."""

    @model_validator(mode="after")
    def _something(self) -> FreezeConfig:
        if not (self.embeddings or self.first_layers or self.last_layers or self.patterns):
            raise ValueError(
                "freezes nothing: give embeddings: true, first_layers, last_layers or patterns, or remove freeze"
            )
        return self


def _long_form(value: Any) -> Any:
    """The mapping that `embeddings` or a list of patterns, which may contain that word, stands for."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list):
        return value
    return {"embeddings": "embeddings" in names, "patterns": [name for name in names if name != "embeddings"]}


Freeze = Annotated[
    Optional[FreezeConfig],
    BeforeValidator(_long_form, json_schema_input_type=Union[str, list[str], FreezeConfig, None]),
]


class RopeConfig(Section):
    """Longer sequences for a model with rotary positions. Give factor or length."""

    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """How the frequencies are rescaled, in transformers' names. `dynamic` (NTK) follows the longest document of a batch, so a
    score depends on what else is in the batch; the others do not."""
    factor: Optional[float] = Field(default=None, gt=1)
    """Positions as a multiple of those that the model has."""
    length: Optional[int] = Field(default=None, gt=0)
    """Positions, in tokens."""

    @model_validator(mode="after")
    def _one_size(self) -> RopeConfig:
        if (self.factor is None) == (self.length is None):
            raise ValueError("give either factor (times the model's positions) or length (tokens)")
        return self


EMBEDDING_MODULES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""What families call the token embedding and the output head. They get no low-rank matrices."""


class AdapterConfig(Section):
    """Low-rank matrices beside frozen weights, through peft. The weights of the model itself are not trained."""

    type: Literal["lora", "dora"] = "lora"
    """`lora`: Hu et al. 2021, arXiv:2106.09685. `dora`: magnitude and direction trained apart, arXiv:2402.09353; slower."""
    rank: int = Field(default=16, ge=1)
    """Rank of each matrix. The capacity of an adapter grows with it."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank)."""
    rslora: bool = False
    """Scale by the root of the rank, so that high ranks learn as fast as low ones: arXiv:2312.03732."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the model are trained."""
    targets: Union[Literal["all-linear"], list[str]] = "all-linear"
    """The linear layers that get an adapter: `all-linear` (all but the output head), or the last parts of their names, such as
    [q_proj, v_proj]. Embeddings and head named here are trained in full instead, as in `modules_to_save`."""
    experts: bool = False
    """Whether the experts of a mixture, stacked tensors and no linear layers, get low-rank matrices too: `rank` for each expert.
    Takes the memory of the experts once more, so use train.activation_checkpointing. Not possible with dropout or dora."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules trained in full beside the adapters and saved with them, usually [embed_tokens, lm_head]."""
    lora_plus_ratio: Optional[float] = Field(default=None, ge=1)
    """LoRA+, arXiv:2402.12354: learning rate of the B matrices over that of the A matrices; the paper uses 16. Default: equal."""


class ModelConfig(Section):
    """Which model is trained: pretrained weights, or an architecture with fresh weights."""

    pretrained: Optional[str] = None
    """Hub id, local folder, steep run or checkpoint, or .gguf file (dequantized) to start from."""
    config: Optional[Union[str, dict[str, Any]]] = None
    """Start from fresh weights of this architecture: a mapping with `model_type` (transformers' names, e.g. `llama`)
    and its sizes, or a hub id, folder or config.json that has them."""
    revision: Optional[str] = None
    """Branch, tag or commit of a hub model."""
    attention: Literal["auto", "document", "sdpa", "eager"] = "auto"
    """`document` computes attention document by document (varlen kernel on CUDA); `sdpa` and `eager` are transformers'
    own with restarting position_ids. `auto` takes `document` if the model allows it."""
    rope: Optional[RopeConfig] = None
    """Extend the context of a model with rotary positions: `{type: yarn, length: 8192}`."""
    quantize: Optional[Literal["nf4", "int8", "torchao_int8"]] = None
    """Keep the linear layers of the frozen base in 4 bits (`nf4`, double quantization) or 8 bits (`int8`) through bitsandbytes,
    or in 8 bits through torchao, weights only (extra `quant`). Needs an `adapter`: quantized weights cannot be trained."""
    offload_embeddings: bool = False
    """On a GPU, keep the frozen input embedding in host memory and copy the rows that a batch needs. Not possible if it is
    trained or tied to the output head."""
    balance_loss: Optional[float] = Field(default=None, ge=0)
    """Coefficient of the balancing loss of a mixture of experts; 0 adds none. Default: the model's own, such as
    `router_aux_loss_coef` in its config.json; a model without one gets none."""
    freeze: Freeze = None
    """What is not trained: `embeddings`, a list of name patterns, or a mapping with both and with layers from either end."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.pretrained is None) == (self.config is None):
            raise ValueError(
                "give either pretrained (weights to start from) or config (an architecture with fresh weights)"
            )
        return self
