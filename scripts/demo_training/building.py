"""The demo's tokenizer, base model and adapter shapes, and how they are written to disk."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from demo_training.corpus import (
    CHAT_TEMPLATE,
    END,
    END_ID,
    PAD,
    PAD_ID,
    SPECIAL_TOKENS,
    tokenizer_text,
)

__all__ = [
    "ADAPTERS",
    "AdapterShape",
    "build_base",
    "build_tokenizer",
    "load_base",
    "load_tokenizer",
    "lora_config",
    "save_adapter",
    "save_base",
]

VOCAB_SIZE = 2048
BASE_NAME = "lorikeet/demo-base"  # neutral on purpose: a path would be this machine's

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """Rank, scale and targets of one adapter; together they cover what a server must handle."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    rslora: bool = False


ADAPTERS = {
    "lines": AdapterShape(4, 8, (*_ATTENTION, "gate_proj")),
    "json": AdapterShape(16, 32, _ALL_LINEAR),
    "sql": AdapterShape(64, 64, _ALL_LINEAR),
    "pirate": AdapterShape(8, 16, ("q_proj", "v_proj"), rslora=True),
}


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE on the training text: it encodes any text and gives it back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(random.Random(seed), 20_000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def build_base() -> LlamaForCausalLM:
    """Build the untrained base.

    Two query heads share a key head, and the heads together are wider than the hidden state: both
    are legal, neither is the common case, and an engine that confuses the sizes fails on them.
    """
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def lora_config(shape: AdapterShape) -> LoraConfig:
    """Return the PEFT configuration of an adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.targets),
        use_rslora=shape.rslora,
        lora_dropout=0.0,
    )


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write base and tokenizer, the weights rounded to bfloat16; `model` is rounded too."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    # Releases of transformers before 5 read the same file: they do not know the class name that 5
    # writes, nor a list of extra tokens, which tokenizer.json marks as special anyway.
    _edit_json(
        directory / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        drop=("backend", "extra_special_tokens"),
    )
    _make_readable(directory)


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Write the active adapter, rounded to bfloat16."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(directory), save_embedding_layers=False)
    (directory / "README.md").unlink()
    weights = directory / "adapter_model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(rounded, weights, metadata={"format": "pt"})
    # PEFT keeps a set, whose order changes from run to run.
    config = directory / "adapter_config.json"
    targets = json.loads(config.read_text("utf-8"))["target_modules"]
    _edit_json(config, {"target_modules": sorted(targets)})
    _make_readable(directory)


def load_tokenizer(root: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the demo that lies in `root`."""
    return PreTrainedTokenizerFast.from_pretrained(root / "base")


def load_base(root: Path) -> LlamaForCausalLM:
    """Load the base as shipped, rounded to bfloat16, and compute with it in float32."""
    return LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)


def _edit_json(path: Path, changes: dict[str, object], drop: tuple[str, ...] = ()) -> None:
    values = json.loads(path.read_text("utf-8")) | changes
    kept = {key: value for key, value in values.items() if key not in drop}
    text = json.dumps(kept, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, "utf-8")


def _make_readable(directory: Path) -> None:
    # safetensors writes for the owner only, but the files are to be packaged and shared.
    for path in directory.iterdir():
        path.chmod(0o644)
