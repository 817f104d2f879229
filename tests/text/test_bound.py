"""No text has fewer tokens than its length promises."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lorikeet.text.bound import text_bound
from lorikeet.text.tokenizer import Tokenizer
from tests.support.tokenizer_variants import VARIANTS
from tests.support.tokenizers import make_tokenizer

Change = Callable[[Any], None]


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backend]:
    made: dict[str, Backend] = {}
    for name, make in VARIANTS.items():
        directory = tmp_path_factory.mktemp(name)
        make(directory)
        made[name] = Tokenizer.load(directory)._backend
    return made


@pytest.fixture
def backend(tmp_path: Path) -> Backend:
    return Backend.from_file(str(make_tokenizer(tmp_path) / "tokenizer.json"))


def num_tokens(backend: Backend, text: str) -> int:
    return len(backend.encode(text, add_special_tokens=False).ids)


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(st.text(max_size=60), st.text(alphabet=" \n\taé東▁<s>", max_size=200)),
    name=st.sampled_from(sorted(VARIANTS)),
)
def test_any_text_has_that_many_tokens(backends: dict[str, Backend], text: str, name: str) -> None:
    bound = text_bound(backends[name])
    assert bound is None or bound.least_tokens(text) <= num_tokens(backends[name], text)


@pytest.mark.parametrize("name", VARIANTS)
def test_texts_of_the_longest_tokens(name: str, backends: dict[str, Backend]) -> None:
    """There are texts that meet the bound, but for a normalizer's part in it."""
    backend = backends[name]
    bound = text_bound(backend)
    if name == "words":
        assert bound is None
        return
    assert bound is not None
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for token in sorted(vocabulary, key=len)[-20:]:
        text = backend.decode([vocabulary[token]], skip_special_tokens=False)
        for repeated in (text, text * 7):
            assert bound.least_tokens(repeated) <= num_tokens(backend, repeated)
    assert bound.least_tokens("x" * 100_000) > 100


def test_an_english_text_that_is_far_too_long(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_tokenizer(tmp_path))
    text = "What is the capital of France? " * 1000
    assert len(text) / 20 < tokenizer.least_tokens(text) <= len(tokenizer.encode(text))


def split(behavior: Any) -> pre_tokenizers.PreTokenizer:
    rule = pre_tokenizers.Split(Regex(r"\s+"), behavior)
    return pre_tokenizers.Sequence([rule, pre_tokenizers.ByteLevel(use_regex=False)])


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({}, 13),
        ({"normalizer": normalizers.NFC()}, 13 * 4),
        ({"normalizer": normalizers.Sequence([normalizers.NFKD(), normalizers.Prepend("a")])}, 56),
        ({"normalizer": normalizers.Lowercase()}, 13 * 4),
        ({"normalizer": normalizers.Replace(" ", "▁")}, 13),
        ({"normalizer": normalizers.Replace("aa", "b")}, 26),
        ({"normalizer": normalizers.Replace("東", "b")}, 39),
        ({"normalizer": normalizers.Replace("aa", "")}, None),
        ({"normalizer": normalizers.Replace(Regex(" +"), " ")}, None),
        ({"normalizer": normalizers.Strip()}, None),
        ({"normalizer": normalizers.StripAccents()}, None),
        ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Nmt()])}, None),
        ({"pre_tokenizer": split("isolated")}, 13),
        ({"pre_tokenizer": split("removed")}, None),
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, None),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, None),  # not the alphabet of bytes
        ({"model": models.BPE(vocab={"a": 0}, merges=[])}, None),
        ({"model": models.WordPiece(vocab={"a": 0, "[UNK]": 1}, unk_token="[UNK]")}, None),
        ({"model": models.Unigram([("a", 0.0)], 0)}, None),
    ],
)
def test_which_tokenizers_have_a_bound(
    backend: Backend, change: dict[str, Any], longest: float | None
) -> None:
    for name, value in change.items():
        setattr(backend, name, value)
    bound = text_bound(backend)
    assert (None if bound is None else bound.longest) == longest


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_a_token_that_takes_the_space_beside_it(backend: Backend, side: str) -> None:
    backend.add_tokens([AddedToken("<mask>", **{side: True}, normalized=False)])
    space = " \t\n\u3000\x85" * 1000
    text = "<mask>".join([space] * 4)
    bound = text_bound(backend)
    assert bound is not None
    assert bound.least_tokens(text) <= num_tokens(backend, text)
    assert bound.least_tokens(text) < 5
    assert bound.least_tokens("a b" * 1000) > 100


def test_a_token_that_is_longer_once_it_is_normalized(backend: Backend) -> None:
    backend.normalizer = normalizers.NFKD()
    word = "\ufdfa"  # 18 characters
    backend.add_tokens([AddedToken(word * 3, normalized=True)])
    bound = text_bound(backend)
    assert bound is not None
    text = unicodedata.normalize("NFKD", word * 3) * 10
    assert num_tokens(backend, text) == 10
    assert bound.least_tokens(text) <= 10


@pytest.mark.parametrize(("composed", "decomposed"), [("NFC", "NFD"), ("NFKC", "NFKD")])
def test_composing_makes_no_text_shorter_than_thought(composed: Any, decomposed: Any) -> None:
    """Give each character's length to the parts that it decomposes into; sum them up for what is composed of them."""
    chars = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    most: dict[str, tuple[float, float]] = {}
    for char in chars:
        parts = unicodedata.normalize(decomposed, char)
        share = (1 / len(parts), len(char.encode()) / len(parts))
        for part in parts:
            known = most.get(part, (0.0, 0.0))
            most[part] = (max(known[0], share[0]), max(known[1], share[1]))
    for char in chars:
        if unicodedata.normalize(composed, char) == char:
            shares = [most[part] for part in unicodedata.normalize(decomposed, char)]
            assert sum(share[0] for share in shares) <= 4
            assert sum(share[1] for share in shares) / len(char.encode()) <= 4
