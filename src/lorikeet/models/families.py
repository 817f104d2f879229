"""What differs between the families of Llama-shaped decoders, as data. No torch here.

Every family is: embedding, layers of (RMSNorm, attention with RoPE, RMSNorm, gated SiLU MLP), RMSNorm, LM head. The
defaults are those that transformers uses when a config leaves a field out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# A bias that a family fixes, or "config": the config's own field decides.
FixedOrConfig = bool | Literal["config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture.

    Attributes:
        qkv_bias, o_bias: bias of the attention projections; "config" means the field ``attention_bias``.
        mlp_bias: bias of the MLP projections; "config" means the field ``mlp_bias``.
        qk_norm: RMSNorm over the head dimension of queries and keys, before RoPE.
        window: ``none``: full attention whatever the config says; ``all``: the field ``sliding_window`` holds for every
            layer; ``layers``: ``use_sliding_window``, ``max_window_layers`` and ``layer_types`` say for which.
        num_kv_heads: default; None means as many as query heads.
        head_dim: default; None means hidden size / heads.
    """

    architecture: str
    model_type: str
    qkv_bias: FixedOrConfig = False
    o_bias: FixedOrConfig = False
    mlp_bias: FixedOrConfig = False
    qk_norm: bool = False
    window: Literal["none", "all", "layers"] = "none"
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None


_FAMILIES = (
    Family(
        architecture="LlamaForCausalLM",
        model_type="llama",
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        bos_token_id=1,
        eos_token_id=2,
    ),
    Family(
        architecture="MistralForCausalLM",
        model_type="mistral",
        window="all",
        num_kv_heads=8,
        max_position_embeddings=4096 * 32,
        sliding_window=4096,
        bos_token_id=1,
        eos_token_id=2,
    ),
    Family(
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        qkv_bias=True,
        window="layers",
        num_kv_heads=32,
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
    Family(
        architecture="Qwen3ForCausalLM",
        model_type="qwen3",
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        window="layers",
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
)

FAMILIES: dict[str, Family] = {family.architecture: family for family in _FAMILIES}
