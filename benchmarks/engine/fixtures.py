"""Models and adapters of real shapes, without their weights' content: a configuration, random adapters.

Shape legend: D input features, O output features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorikeet import demo
from lorikeet.core.sites import LoRASite
from lorikeet.models.spec import ModelSpec

LLAMA_8B = "llama-3.1-8b"
_LLAMA_8B_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
# Small, so that thirty-two layers of deltas leave the activations finite.
_ADAPTER_SCALE = 0.01


def model_directory(name: str, scratch: Path) -> tuple[Path, str]:
    """Directory of a model and the load format that it needs.

    Args:
        name: a directory with a ``config.json`` (weights are drawn at random), ``demo`` (its own weights), or
            ``llama-3.1-8b``, which is written below ``scratch``.
    """
    if demo.is_demo(name):
        return demo.model_path(), "auto"
    if name == LLAMA_8B:
        path = scratch / LLAMA_8B
        write_model(path, _LLAMA_8B_CONFIG)
        return path, "dummy"
    return Path(name), "dummy"


def write_model(directory: Path, config: dict[str, object]) -> None:
    """Write ``config.json`` and a tokenizer with one token for each byte and filler tokens for the rest.

    Args:
        config: of a Hugging Face model; its vocabulary has to hold the 256 bytes.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Fillers decode to a short word each, so that text grows as it does with a real vocabulary.
    fillers = (f"Ġw{number}" for number in range(len(alphabet), int(str(config["vocab_size"]))))
    vocab = {token: number for number, token in enumerate([*alphabet, *fillers])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def linear_sites(spec: ModelSpec) -> list[LoRASite]:
    """The linear layers of the decoder layers, as packed as the engine runs them; without the LM head."""
    return [site for site in spec.lora_sites if site.kind in ("column", "row")]


def write_adapters(root: Path, num: int, spec: ModelSpec, rank: int) -> list[Path]:
    """PEFT adapters on every linear layer, in bfloat16, in directories below ``root``.

    Their values are windows of one row of random numbers, each begun a little later: different bytes in every adapter,
    and billions of numbers need not be drawn.
    """
    modules = [
        (part.hf_path, site.in_features, part.out_features)
        for site in linear_sites(spec)
        for part in site.slices
    ]
    step = 1009
    size = sum(rank * (num_inputs + num_outputs) for _, num_inputs, num_outputs in modules)
    noise = torch.randn(size + step * num, generator=torch.Generator().manual_seed(0))
    values = (noise * _ADAPTER_SCALE).to(torch.bfloat16)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({path.rsplit(".", 1)[1] for path, _, _ in modules}),
    }
    paths: list[Path] = []
    for number in range(num):
        directory = root / f"adapter-{number:04d}"
        directory.mkdir(parents=True)
        window = values[step * number : step * number + size].clone()
        save_file(dict(_tensors(window, modules, rank)), directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config))
        paths.append(directory)
    return paths


def _tensors(
    values: torch.Tensor, modules: list[tuple[str, int, int]], rank: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """A [R, D] and B [O, R] of each module, cut out of ``values`` one after the other."""
    first = 0
    for path, num_inputs, num_outputs in modules:
        for half, shape in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
            size = shape[0] * shape[1]
            yield (
                f"base_model.model.{path}.lora_{half}.weight",
                values[first : first + size].view(shape),
            )
            first += size
