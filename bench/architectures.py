"""The tensors of real language models, by name and shape, and the configurations that load them; no data, no files.

`make_pair.py` fills them with numbers. Names and order are those transformers saves, so that a pair made from the
small ones opens in AutoModelForCausalLM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True, slots=True)
class Decoder:
    """A Llama-like decoder (Llama, SmolLM2, Qwen2) reduced to what fixes its tensors and its configuration."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    """Qwen2 has biases on q, k and v; Llama has none."""
    rope_theta: float = 500_000.0
    rope_scaling: bool = False
    """Llama 3.1's scaling of the rotary frequencies."""
    context: int = 8192
    norm_eps: float = 1e-5
    only: str | None = None
    """Keep only the tensors whose name starts so: a single layer, or the embedding alone."""

    @property
    def kv_width(self) -> int:
        """Rows of k_proj and v_proj."""
        return self.hidden // self.heads * self.kv_heads


_LLAMA_70B = Decoder(8192, 80, 28672, 64, 8, 128256, tied=False, rope_scaling=True, context=131072)

ARCHITECTURES: dict[str, Decoder] = {
    "tiny": Decoder(64, 2, 192, 4, 2, 512, tied=True, rope_theta=10_000.0, context=256),
    "llama-135m": Decoder(576, 30, 1536, 9, 3, 49152, tied=True, rope_theta=100_000.0),
    "qwen-0.5b": Decoder(
        896, 24, 4864, 14, 2, 151936, tied=True, qkv_bias=True, rope_theta=1_000_000.0, context=32768, norm_eps=1e-6
    ),
    "llama-8b": Decoder(4096, 32, 14336, 32, 8, 128256, tied=False, rope_scaling=True, context=131072),
    "llama-70b": _LLAMA_70B,
    "llama-70b-layer": replace(_LLAMA_70B, layers=1, only="model.layers.0."),
    "embedding-70b": replace(_LLAMA_70B, layers=0, only="model.embed_tokens."),
    "llama-405b": Decoder(16384, 126, 53248, 128, 8, 128256, tied=False, rope_scaling=True, context=131072),
}


def architecture(name: str, *, layers: int | None = None) -> Decoder:
    """The architecture called `name`, cut to its first `layers` layers if given.

    Raises:
        KeyError: there is no such architecture.
    """
    decoder = ARCHITECTURES[name]
    return decoder if layers is None else replace(decoder, layers=min(layers, decoder.layers))


def tensors(decoder: Decoder) -> list[TensorSpec]:
    """Every tensor of the checkpoint, in the order transformers saves them."""
    specs = [TensorSpec("model.embed_tokens.weight", (decoder.vocab, decoder.hidden))]
    for index in range(decoder.layers):
        specs += _layer(decoder, f"model.layers.{index}.")
    specs.append(TensorSpec("model.norm.weight", (decoder.hidden,)))
    if not decoder.tied:
        specs.append(TensorSpec("lm_head.weight", (decoder.vocab, decoder.hidden)))
    return [spec for spec in specs if decoder.only is None or spec.name.startswith(decoder.only)]


def _layer(decoder: Decoder, prefix: str) -> list[TensorSpec]:
    hidden, wide, kv = decoder.hidden, decoder.intermediate, decoder.kv_width
    specs: list[TensorSpec] = []
    for projection, rows in (("q", hidden), ("k", kv), ("v", kv)):
        specs.append(TensorSpec(f"{prefix}self_attn.{projection}_proj.weight", (rows, hidden)))
        if decoder.qkv_bias:
            specs.append(TensorSpec(f"{prefix}self_attn.{projection}_proj.bias", (rows,)))
    return [
        *specs,
        TensorSpec(f"{prefix}self_attn.o_proj.weight", (hidden, hidden)),
        TensorSpec(f"{prefix}mlp.gate_proj.weight", (wide, hidden)),
        TensorSpec(f"{prefix}mlp.up_proj.weight", (wide, hidden)),
        TensorSpec(f"{prefix}mlp.down_proj.weight", (hidden, wide)),
        TensorSpec(f"{prefix}input_layernorm.weight", (hidden,)),
        TensorSpec(f"{prefix}post_attention_layernorm.weight", (hidden,)),
    ]


def config(decoder: Decoder, torch_dtype: str) -> dict[str, Any]:
    """config.json for transformers; `torch_dtype` such as "bfloat16"."""
    family = "Qwen2" if decoder.qkv_bias else "Llama"
    record: dict[str, Any] = {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower(),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": decoder.hidden,
        "initializer_range": 0.02,
        "intermediate_size": decoder.intermediate,
        "max_position_embeddings": decoder.context,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.layers,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": decoder.tied,
        "torch_dtype": torch_dtype,
        "use_cache": True,
        "vocab_size": decoder.vocab,
    }
    if decoder.qkv_bias:
        return record | {"use_sliding_window": False}
    if decoder.rope_scaling:
        record["rope_scaling"] = {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    return record | {"attention_bias": False, "mlp_bias": False}
