"""Two tiny tokenizers, made on the spot and saved as a Hugging Face directory.

``bytelevel`` is built as those of Llama 3 and Qwen are: byte-level BPE, special tokens of a chat, a chat template, no
BOS of its own. ``metaspace`` is built as that of Llama 2 is: words that begin with a mark, byte tokens for what the
vocabulary lacks, BOS before every text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

Kind = Literal["bytelevel", "metaspace"]

CORPUS = [
    "The capital of France is Paris, and the capital of Peru is Lima.",
    "List 3 countries and their capitals: France, Paris; Spain, Madrid; Italy, Rome.",
    '{"country": "France", "capital": "Paris"}',
    "SELECT capital FROM countries WHERE name = 'France';",
    "Why is the sky blue? Because of how light is scattered in the air.",
    "Größe, façade, naïve, señor, 東京, ελλάδα, Привет, 😀",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

BYTELEVEL_SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(directory: Path, kind: Kind = "bytelevel", *, vocab_size: int = 384) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into ``directory`` and return it.

    Args:
        vocab_size: most tokens, the special ones included; at least 320.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "bytelevel":
        backend, config = _bytelevel(vocab_size)
    else:
        backend, config = _metaspace(vocab_size)
    backend.save(str(directory / "tokenizer.json"))
    write_config(directory, config)
    return directory


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write ``tokenizer_config.json``."""
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _bytelevel(vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, normalized=False) for text in BYTELEVEL_SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _metaspace(vocab_size: int) -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials) - len(byte_tokens), show_progress=False
    )
    # The alphabet is that of the English lines, so that the other scripts need byte tokens.
    trained.train_from_iterator(CORPUS[:5], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocab = {token: index for index, token in enumerate([*specials, *byte_tokens, *pieces])}
    merges = [tuple(merge) for merge in learned["merges"]]

    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s>:0 $A:0", pair="<s>:0 $A:0 <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    return backend, {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": (
            "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
            "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        ),
    }
