"""Where LoRA may enter a model: the vocabulary that models and adapters share.

A model declares its sites (``models/spec.py``); ``lora/`` matches an adapter's modules against them. Neither knows the
other, both know this file. A site is one linear layer (or the embedding table) as *we* build it; a slice is one of the
Hugging Face modules that were packed into it.

Example, layer 3 of a model with 8 query heads, 2 key heads, head size 16 and hidden size 64::

    LoRASite(path="layers.3.attention.qkv_proj", kind="column", layer=3, in_features=64, slices=(
        SiteSlice("q_proj", "model.layers.3.self_attn.q_proj", offset=0, out_features=128),
        SiteSlice("k_proj", "model.layers.3.self_attn.k_proj", offset=128, out_features=32),
        SiteSlice("v_proj", "model.layers.3.self_attn.v_proj", offset=160, out_features=32)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# column: output features are divided over the ranks. row: input features are, and one all-reduce sums the outputs.
# embedding: the table is indexed by token id. lm_head: a column layer that sees only the rows whose logits are wanted.
SiteKind = Literal["column", "row", "embedding", "lm_head"]


@dataclass(frozen=True, slots=True)
class SiteSlice:
    """One module of the Hugging Face model inside a (possibly packed) site.

    Attributes:
        name: last component of the module's path, the name that PEFT's ``target_modules`` uses (``q_proj``).
        hf_path: the module's path in the Hugging Face model (``model.layers.3.self_attn.q_proj``).
        offset: first of its output features inside the site's output.
        out_features: how many there are; the hidden size for ``embed_tokens``, the vocabulary for ``lm_head``.
    """

    name: str
    hf_path: str
    offset: int
    out_features: int


@dataclass(frozen=True, slots=True)
class LoRASite:
    """One place where a low-rank delta can be added. All sizes are those of the whole model, not of one rank's shard.

    Attributes:
        path: the module's path in our decoder (``layers.3.attention.qkv_proj``).
        layer: index of the decoder layer; None for the embedding and the LM head.
        in_features: input features; the vocabulary size for the embedding.
        slices: in order of ``offset``, without gaps.
    """

    path: str
    kind: SiteKind
    layer: int | None
    in_features: int
    slices: tuple[SiteSlice, ...]

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.slices)
