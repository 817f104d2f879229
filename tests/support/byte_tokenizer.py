"""A tokenizer with one token per byte: the text of a test is its tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = 256


def save_byte_tokenizer(directory: Path) -> Path:
    """Write ``tokenizer.json``: token b is the byte b, token 256 is ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte)
    vocab = {character: _byte(character) for character in alphabet}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return directory


def _byte(character: str) -> int:
    """Byte-level BPE writes printable bytes as themselves and the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    code = ord(character)
    return code if code < 0x100 else others[code - 0x100]
