"""Tiny random checkpoints in Hugging Face format, one family each, with a working tokenizer beside them.

The weights are drawn so that a mistake shows: logits have a spread of a few units (greedy choices are not near ties),
norm weights differ from 1 and biases from 0.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
NUM_TOKENIZER_TOKENS = 259

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

_COMMON: dict[str, object] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_FAMILY: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}


def make_tiny_model(
    tmp_path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **overrides: object,
) -> Path:
    """Write a random checkpoint and return its directory, below ``tmp_path``.

    A checkpoint is made once in a session for each set of arguments and then copied, so a caller may change its files.

    Args:
        family: one of :data:`FAMILIES`.
        max_shard_size: as transformers' ``save_pretrained``; a small one gives several shards and an index.
        overrides: fields of the Hugging Face config: ``num_hidden_layers=3``, ``head_dim=24``, ``attention_bias=True``,
            ``sliding_window=8``, ``rope_parameters={...}``, ``tie_word_embeddings=True``, ...
    """
    key = json.dumps([family, seed, dtype, max_shard_size, overrides], sort_keys=True)
    target = tmp_path / f"{family}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if not target.exists():
        shutil.copytree(_cached_model(key), target)
    return target


@functools.cache
def _session_dir() -> Path:
    path = Path(tempfile.mkdtemp(prefix="lorikeet-tiny-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _cached_model(key: str) -> Path:
    family, seed, dtype, max_shard_size, overrides = json.loads(key)
    fields = {**_COMMON, **_FAMILY[family], **overrides}
    if fields["vocab_size"] < NUM_TOKENIZER_TOKENS:
        raise ValueError(f"the tokenizer has {NUM_TOKENIZER_TOKENS} tokens; vocab_size is smaller")
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config)
    _draw_weights(model, seed)
    path = _session_dir() / hashlib.sha256(key.encode()).hexdigest()
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    _write_tokenizer(path)
    return path


@torch.no_grad()
def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.3 * noise)
        elif "lm_head" in name:
            parameter.copy_(3 * noise / parameter.shape[1] ** 0.5)
        elif "embed_tokens" in name:
            parameter.copy_(0.4 * noise)
        else:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)


def _write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: one token for each byte, then BOS, EOS and PAD. Any text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (BOS, EOS, PAD)])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
