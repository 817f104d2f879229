"""A lower bound on a text's tokens, from its length alone: what can never fit is refused before it is tokenized.

No token stands for more of a text than the longest one of the vocabulary. That holds only where a tokenizer makes a
token of every piece of a text; where it drops something, or makes one token of any number of pieces, there is no bound.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from lorikeet.text.streams import byte_level_alphabet, flatten

# Composing characters, or writing them in another form, makes a text at most so many times shorter, in characters and
# in bytes (a mathematical letter of 4 bytes becomes one of ASCII). tests/text/test_bound.py computes it.
_MOST_COMPOSED = 4.0

_KEEP_LENGTH = {"Prepend": 1.0, "ByteLevel": 1.0}
_COMPOSE = dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD", "Lowercase"), _MOST_COMPOSED)
# They cut a text, or write each character of it as one or more others.
_PRE_TOKENIZERS = frozenset(("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split"))
_UTF8 = (*range(0xC0), *range(0xC2, 0xF5))
"""Bytes that a text may contain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextBound:
    """What one token stands for at most.

    Attributes:
        longest: characters, or bytes of UTF-8, of one token.
        in_bytes: which of them.
        skips_space: white space around some tokens belongs to them, however much it is, so that it does not count.
    """

    longest: float
    in_bytes: bool
    skips_space: bool

    def least_tokens(self, text: str) -> int:
        """Fewest tokens that can make up a text, which must have no lone surrogates."""
        if self.skips_space:
            text = "".join(text.split())
        length = len(text.encode()) if self.in_bytes else len(text)
        return math.ceil(length / self.longest)


def text_bound(backend: tokenizers.Tokenizer) -> TextBound | None:
    """The bound of a tokenizer; None if a token of it may stand for a text of any length.

    Only byte-level and byte-fallback BPE have one: other models have a token for whatever they do not know.
    """
    shrinking = _shrinking(_parts(backend.normalizer, "normalizers"))
    pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
    if shrinking is None or not all(map(_keeps_everything, pre_tokenizers)):
        return None
    model: Any = backend.model
    if not isinstance(model, tokenizers.models.BPE):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    kinds = {part["type"] for part in (*_parts(backend.normalizer, "normalizers"), *pre_tokenizers)}
    if "ByteLevel" in kinds:
        in_bytes = True
        alphabet = byte_level_alphabet()
        is_complete = all(char in vocabulary for char, byte in alphabet.items() if byte in _UTF8)
    else:
        in_bytes = False
        is_complete = model.byte_fallback and all(f"<0x{b:02X}>" in vocabulary for b in _UTF8)
    if not is_complete:
        return None
    added = backend.get_added_tokens_decoder().values()
    forms = [token.content for token in added]
    if (normalizer := backend.normalizer) is not None:
        forms += [normalizer.normalize_str(text) for text in forms]
    lengths = [
        *map(len, vocabulary),  # a character of a byte-level token is a byte
        *(len(text.encode() if in_bytes else text) for text in forms),
    ]
    return TextBound(
        longest=max(lengths) * shrinking,
        in_bytes=in_bytes,
        skips_space=any(token.lstrip or token.rstrip for token in added),
    )


def _parts(component: Any, name: str) -> list[Mapping[str, Any]]:
    """A normalizer or a pre-tokenizer as the objects of ``tokenizer.json`` that it consists of."""
    return flatten(None if component is None else json.loads(component.__getstate__()), name)


def _shrinking(normalizers: Iterable[Mapping[str, Any]]) -> float | None:
    """How many times shorter they make a text at most; None if that is not known."""
    most = 1.0
    for part in normalizers:
        known = {**_KEEP_LENGTH, **_COMPOSE}.get(part["type"])
        if part["type"] == "Replace":
            known = _shrinking_of_replace(part)
        if known is None:
            return None
        most *= known
    return most


def _shrinking_of_replace(part: Mapping[str, Any]) -> float | None:
    old, new = part["pattern"].get("String"), str(part["content"])
    if not old or not new:
        return None
    return max(1.0, len(old) / len(new), len(old.encode()) / len(new.encode()))


def _keeps_everything(pre_tokenizer: Mapping[str, Any]) -> bool:
    kind = pre_tokenizer["type"]
    return kind in _PRE_TOKENIZERS and pre_tokenizer.get("behavior") != "Removed"
