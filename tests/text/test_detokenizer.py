"""Deltas never break a character, and together they are what the tokenizers library makes of all tokens at once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from lorikeet.text.tokenizer import Detokenizer, Tokenizer
from tests.support.tokenizers import make_tokenizer, write_config

# Decoders as they occur in published models, and a few that only have to be right.
DECODERS: dict[str, Any] = {
    "bytelevel": None,
    "metaspace": None,
    "metaspace keeps spaces": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "metaspace decoder": decoders.Metaspace(prepend_scheme="first"),
    "metaspace decoder, never": decoders.Metaspace(prepend_scheme="never"),
    "bytes then metaspace": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    ),
    "strip pieces": decoders.Sequence([decoders.ByteFallback(), decoders.Strip("a", 1, 2)]),
    "strip much": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 3, 0),
        ]
    ),
    "replace after fuse": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", "__")]
    ),
    "words": "words",
}


def make(directory: Path, name: str) -> Tokenizer:
    decoder = DECODERS[name]
    if decoder == "words":
        backend = Backend(
            models.WordLevel({text: i for i, text in enumerate(["?", "a", "b", "é"])})
        )
        backend.add_special_tokens(["<x>", "<y>"])
        directory.mkdir(parents=True, exist_ok=True)
        backend.save(str(directory / "tokenizer.json"))
        return Tokenizer.load(directory)
    make_tokenizer(directory, "bytelevel" if name == "bytelevel" else "metaspace")
    if decoder is not None:
        path = str(directory / "tokenizer.json")
        backend = Backend.from_file(path)
        backend.decoder = decoder
        backend.add_tokens(["東京", "é", "added token"])
        backend.save(path)
        write_config(directory, {"tokenizer_class": "PreTrainedTokenizerFast"})
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: make(tmp_path_factory.mktemp("t"), name) for name in DECODERS}


def deltas(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@settings(max_examples=400, deadline=None)
@given(
    ids=st.lists(st.integers(0, 395), max_size=50),
    name=st.sampled_from(sorted(DECODERS)),
    skip=st.booleans(),
)
def test_random_tokens_together_are_the_whole_decode(
    tokenizers: dict[str, Tokenizer], ids: list[int], name: str, skip: bool
) -> None:
    tokenizer = tokenizers[name]
    parts = deltas(Detokenizer(tokenizer, skip_special_tokens=skip), ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=400, deadline=None)
@given(
    runs=st.lists(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), max_size=8),
    others=st.lists(st.integers(259, 383), min_size=8, max_size=8),
)
def test_random_byte_tokens_together_are_the_whole_decode(
    tokenizers: dict[str, Tokenizer], runs: list[bytes], others: list[int]
) -> None:
    """Runs of byte tokens, whole and broken characters, between other tokens."""
    tokenizer = tokenizers["metaspace"]
    ids: list[int] = []
    for run, other in zip(runs, others, strict=False):
        ids += [3 + byte for byte in run]
        ids.append(other)
    for end in (len(ids), len(ids) - 1):
        parts = deltas(Detokenizer(tokenizer), ids[:end])
        assert "".join(parts) == tokenizer.decode(ids[:end])


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), name=st.sampled_from(["bytelevel", "metaspace"]))
def test_a_text_streams_in_whole_characters(
    tokenizers: dict[str, Tokenizer], text: str, name: str
) -> None:
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    shown = ""
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert whole.startswith(shown)
        # What is only held back would be the very continuation.
        assert whole.startswith(shown + detokenizer.peek())
    assert shown + detokenizer.flush() == whole


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 383), max_size=30),
    before=st.lists(st.integers(259, 383), min_size=1, max_size=3),
    name=st.sampled_from(["bytelevel", "metaspace", "metaspace decoder", "words"]),
)
def test_a_continuation_is_what_the_prompt_lacks(
    tokenizers: dict[str, Tokenizer], ids: list[int], before: list[int], name: str
) -> None:
    """With ``continues`` the text is that of prompt and completion less that of the prompt."""
    tokenizer = tokenizers[name]
    before = (
        [1, 2]
        if name == "words"
        else [i for i in before if "\ufffd" not in tokenizer.token_text(i)]
    )
    prompt = tokenizer.decode(before)
    parts = deltas(Detokenizer(tokenizer, continues=bool(before)), ids)
    assert prompt + "".join(parts) == tokenizer.decode(before + ids)


def test_a_character_comes_with_its_last_token(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytelevel"]
    ids = tokenizer.encode("😀", add_special_tokens=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in ids] == [""] * (len(ids) - 1) + ["😀"]
    assert detokenizer.peek() == ""
    assert detokenizer.flush() == ""


def test_a_broken_character_becomes_a_replacement_at_the_end(
    tokenizers: dict[str, Tokenizer],
) -> None:
    for name in ("bytelevel", "metaspace"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("é", add_special_tokens=False)[:-1]
        detokenizer = Detokenizer(tokenizer, continues=True)
        shown = "".join(map(detokenizer.push, ids)).strip()
        assert (shown, detokenizer.peek()) == ("", "")
        assert detokenizer.flush() == "\ufffd"


def test_a_run_of_byte_tokens_can_be_looked_into(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["metaspace"]
    newline, broken = 3 + 0x0A, 3 + 0xFF
    detokenizer = Detokenizer(tokenizer)
    assert (detokenizer.push(newline), detokenizer.peek(), detokenizer.peek()) == ("", "\n", "\n")
    assert (detokenizer.push(newline), detokenizer.peek()) == ("", "\n\n")
    assert (detokenizer.push(broken), detokenizer.peek()) == ("", "")
    assert detokenizer.flush() == "\ufffd" * 3


def test_special_tokens_are_skipped_or_shown(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytelevel"]
    ids = tokenizer.encode("a<|end|>b")
    assert "".join(deltas(Detokenizer(tokenizer), ids)) == "ab"
    shown = Detokenizer(tokenizer, skip_special_tokens=False)
    assert "".join(deltas(shown, ids)) == "a<|end|>b"


def test_spaces_between_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["words"]
    ids = [1, 4, 5, 2, 3]
    for spaces, text in ((True, "a <x> <y> b é"), (False, "a<x><y>b é")):
        detokenizer = Detokenizer(
            tokenizer, skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        assert "".join(deltas(detokenizer, ids)) == text
        assert text == tokenizer.decode(
            ids, skip_special_tokens=False, spaces_between_special_tokens=spaces
        )


def test_ids_without_a_token_are_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert deltas(Detokenizer(tokenizer), [10**6, 10**7]) == ["", "", ""]


@pytest.mark.parametrize("name", ["bytelevel", "metaspace"])
def test_the_cost_of_a_token_does_not_grow(tokenizers: dict[str, Tokenizer], name: str) -> None:
    """The last thousand of 40,000 tokens cost what the first did, within the noise of a busy machine."""
    detokenizer = Detokenizer(tokenizers[name])
    ids = tokenizers[name].encode("The capital of France is 東京. " * 50)[:1000]
    costs: list[float] = []
    for _ in range(40):
        began = time.thread_time()
        for token_id in ids:
            detokenizer.push(token_id)
            detokenizer.peek()
        costs.append(time.thread_time() - began)
    assert min(costs[-10:]) < 3 * min(costs[:10])


def test_an_endless_run_of_byte_tokens_stays_linear(tokenizers: dict[str, Tokenizer]) -> None:
    detokenizer = Detokenizer(tokenizers["metaspace"])
    for _ in range(20_000):
        detokenizer.push(3 + ord("x"))
    began = time.thread_time()
    for _ in range(1000):
        detokenizer.push(3 + ord("x"))
        detokenizer.peek()
    assert time.thread_time() - began < 1
    assert detokenizer.flush() == "x" * 21_000


def test_decoders_of_older_files(tmp_path: Path) -> None:
    """A metaspace decoder without ``prepend_scheme`` says ``add_prefix_space``."""
    make_tokenizer(tmp_path, "metaspace")
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["decoder"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    path.write_text(json.dumps(data), encoding="utf-8")
    write_config(tmp_path, {})
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("a a", add_special_tokens=False)
    assert "".join(deltas(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids) == "a a"
