"""A small Llama and any number of adapters for it, written on the spot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

VOCAB = 512
# What small models have in common; "vocab_size" and the sizes of their layers are their own.
LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """The base model; its weights are dummies, so a configuration is all that there is of it."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4


@dataclass(frozen=True)
class AdapterShape:
    """All adapters of one measurement are alike, so that each takes the place of any other."""

    rank: int
    targets: tuple[str, ...]


def write_model(directory: Path, shape: ModelShape) -> None:
    """``config.json`` and a tokenizer with one word for each token."""
    directory.mkdir(parents=True)
    config = LLAMA | {
        "vocab_size": VOCAB,
        "max_position_embeddings": 2048,
        **asdict(shape),
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(WordLevel({f"t{n}": n for n in range(VOCAB)}, unk_token="t2"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_adapters(root: Path, num: int, model: ModelShape, shape: AdapterShape) -> list[Path]:
    """Adapters with weights of their own, in float16, in directories below ``root``."""
    noise = np.random.default_rng(0)
    paths = []
    for number in range(num):
        directory = root / f"adapter-{number:05d}"
        directory.mkdir(parents=True)
        tensors = {}
        for module, (num_inputs, num_outputs) in _modules(model, shape.targets).items():
            prefix = f"base_model.model.{module}"
            for half, size in (("A", (shape.rank, num_inputs)), ("B", (num_outputs, shape.rank))):
                values = noise.standard_normal(size, dtype=np.float32) * 0.01
                tensors[f"{prefix}.lora_{half}.weight"] = values.astype(np.float16)
        save_file(tensors, directory / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": shape.rank,
            "lora_alpha": shape.rank,
            "target_modules": list(shape.targets),
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        paths.append(directory)
    return paths


def _modules(model: ModelShape, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Path of each module -> its input and output features."""
    head = model.hidden_size // model.num_attention_heads
    hidden, inner, keys = (
        model.hidden_size,
        model.intermediate_size,
        model.num_key_value_heads * head,
    )
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{layer}.{path}": size
        for layer in range(model.num_hidden_layers)
        for path, size in sizes.items()
        if path.rsplit(".", 1)[1] in targets
    }
