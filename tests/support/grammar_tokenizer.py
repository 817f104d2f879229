"""Tiny tokenizers for grammar tests, made on the spot."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 400  # columns of the logits; the tokenizers have fewer tokens
EOS_ID = 0
SPECIAL_ID = 1  # <|im_start|>, a special token that is not an end of sequence

_CORPUS = ['{"name": "Ann", "age": 12, "tags": ["a", true, null], "ok": false}'] * 20
_CORPUS += ["the quick brown fox 2024-05-06 é ü 日本 a@b.co"] * 10


def save_byte_level_tokenizer(directory: Path, *, vocab_size: int = 330) -> Tokenizer:
    """A byte-level BPE with all 256 bytes and some merges; written as ``tokenizer.json``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken("<|eos|>", special=True),
            AddedToken("<|im_start|>", special=True),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def save_byte_fallback_tokenizer(directory: Path) -> Tokenizer:
    """A vocabulary in the manner of Llama 2: pieces with "▁" for spaces, and ``<0x..>`` for other bytes."""
    pieces = ["</s>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [chr(code) for code in range(0x21, 0x7F)] + ["▁", "▁a", "ab", '":']
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("▁", "a"), ("a", "b"), ('"', ":")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer
