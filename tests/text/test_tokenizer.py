"""Ids, texts and rendered chats are those of transformers' own tokenizers for the same files."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from transformers import AutoTokenizer

from lorikeet.errors import ModelError, RequestError
from lorikeet.text.tokenizer import Tokenizer
from tests.support.tokenizer_variants import VARIANTS, edit_backend, edit_config
from tests.support.tokenizers import CHAT_TEMPLATE, make_tokenizer

TEXTS = [
    "",
    " ",
    "Paris",
    " Paris is  the capital\n\nof France.",
    "Größe 東京 😀👩‍👩‍👧 \u0301 e\u0301",
    "<|bos|><|user|>\nhi<|end|>\n",
    "<s>[INST] hi [/INST] yes </s><s>[INST] more [/INST]",
    "a <s> b</s> c",
    "\x00\x7f\t\r\n",
    "<0x0A> ▁▁",
]


class Pair:
    """Our tokenizer and transformers' for one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ours = Tokenizer.load(directory)
        self.theirs: Any = AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made: dict[str, Pair] = {}
    for name, make in VARIANTS.items():
        directory = tmp_path_factory.mktemp(name)
        make(directory)
        made[name] = Pair(directory)
    return made


@pytest.mark.parametrize("name", VARIANTS)
def test_encode_is_that_of_transformers(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    for text in TEXTS:
        for special in (True, False):
            expected = pair.theirs.encode(text, add_special_tokens=special)
            assert pair.ours.encode(text, add_special_tokens=special) == expected, (text, special)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_is_that_of_transformers(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    rows: list[Sequence[int]] = [pair.theirs.encode(text) for text in TEXTS]
    rows += [range(len(pair.theirs)), [0, 1, 2, 1, 0, 10**6]]
    for ids in rows:
        for skip in (True, False):
            expected = pair.theirs.decode(list(ids), skip_special_tokens=skip)
            assert pair.ours.decode(ids, skip_special_tokens=skip) == expected, (ids, skip)


@pytest.mark.parametrize("name", VARIANTS)
def test_special_tokens_are_those_of_transformers(name: str, pairs: dict[str, Pair]) -> None:
    pair = pairs[name]
    assert pair.ours.special_ids >= set(pair.theirs.all_special_ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), name=st.sampled_from(sorted(VARIANTS)))
def test_any_text_is_encoded_as_transformers_does(
    pairs: dict[str, Pair], text: str, name: str
) -> None:
    pair = pairs[name]
    assert pair.ours.encode(text) == pair.theirs.encode(text)


@settings(max_examples=150, deadline=None)
@given(
    ids=st.lists(st.integers(0, 400), max_size=40),
    name=st.sampled_from(sorted(VARIANTS)),
    skip=st.booleans(),
)
def test_any_ids_are_decoded_as_transformers_does(
    pairs: dict[str, Pair], ids: list[int], name: str, skip: bool
) -> None:
    pair = pairs[name]
    expected = pair.theirs.decode(ids, skip_special_tokens=skip)
    assert pair.ours.decode(ids, skip_special_tokens=skip) == expected


def test_spaces_between_special_tokens_matters_where_words_are_joined(
    pairs: dict[str, Pair],
) -> None:
    words = pairs["words"].ours
    (end,) = words.ids_of(["<e>"])
    ids = [1, end, end, 2, 3]
    assert words.decode(ids, skip_special_tokens=False) == "a <e> <e> b c"
    tight = words.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert tight == "a<e><e>b c"
    assert words.decode(ids, spaces_between_special_tokens=False) == "a b c"
    plain = pairs["plain"].ours
    assert plain.decode(
        [1, 1], skip_special_tokens=False, spaces_between_special_tokens=False
    ) == plain.decode([1, 1], skip_special_tokens=False)


def test_text_and_bytes_of_single_tokens(pairs: dict[str, Pair]) -> None:
    for name in ("plain", "metaspace"):
        tokenizer = pairs[name].ours
        text = "Paris 東京 😀"
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids))
        assert joined.decode("utf-8").removeprefix(" ") == text
        assert "\ufffd" in "".join(map(tokenizer.token_text, ids))
    metaspace = pairs["metaspace"].ours
    assert metaspace.token_text(metaspace.encode("a b", add_special_tokens=False)[-1]) in (
        " b",
        "b",
    )
    assert metaspace.token_text(10**6) == ""
    assert metaspace.token_bytes(10**6) == b""
    words = pairs["words"].ours
    assert words.token_text(1) == "a"


@pytest.mark.parametrize("name", ["plain", "metaspace"])
def test_other_threads_run_while_a_text_is_encoded(name: str, pairs: dict[str, Pair]) -> None:
    ticks, is_over = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not is_over.is_set():
            time.sleep(0.001)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks
        ids = pairs[name].ours.encode("What is the capital of France? " * 20_000)
        # If it held the interpreter's lock, the other thread would run at its beginning and its end.
        assert ticks - before >= 5
    finally:
        is_over.set()
        thread.join()
    assert len(ids) > 100_000


def test_texts_of_tokens_are_remembered(
    pairs: dict[str, Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.load(pairs["plain"].directory)
    expected = [(tokenizer.token_text(i), tokenizer.token_bytes(i)) for i in range(300)]
    monkeypatch.setattr(tokenizer, "_backend", None)
    assert [(tokenizer.token_text(i), tokenizer.token_bytes(i)) for i in range(300)] == expected


def test_half_a_surrogate_pair_is_refused(pairs: dict[str, Pair]) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        pairs["plain"].ours.encode("a\ud800")
    with pytest.raises(RequestError, match="not valid Unicode"):
        pairs["plain"].ours.least_tokens("a\ud800")
    assert pairs["words"].ours.least_tokens("a" * 1000) == 0


def test_padding_and_truncation_in_the_file_do_not_touch_prompts(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)

    def limit(backend: Backend) -> None:
        backend.enable_truncation(3)
        backend.enable_padding(length=8)

    edit_backend(tmp_path, limit)
    pair = Pair(tmp_path)
    text = "The capital of France is Paris"
    assert pair.ours.encode(text) == pair.theirs.encode(text)
    assert len(pair.ours.encode(text)) > 3


def test_split_special_tokens(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    edit_config(tmp_path, split_special_tokens=True)
    pair = Pair(tmp_path)
    assert pair.ours.encode("<|end|>") == pair.theirs.encode("<|end|>")
    assert len(pair.ours.encode("<|end|>")) > 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer.json", '{"model": 1}', "tokenizer.json cannot be read"),
        ("tokenizer.json", b"\xff\xfe\x00", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "should hold a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tok"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "chat_template should be"),
        ("special_tokens_map.json", "nope", "special_tokens_map.json is not valid JSON"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, file: str, content: str | bytes | None, words: str
) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content)
    with pytest.raises(ModelError, match=words) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_broken_llama_file_is_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, "metaspace")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"tokenizer.json cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.ByteFallback(), decoders.ByteLevel()]),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path, decoder: Any) -> None:
    make_tokenizer(tmp_path)

    def change(backend: Backend) -> None:
        backend.decoder = decoder

    edit_backend(tmp_path, change)
    with pytest.raises(ModelError, match=r"cannot be streamed; supported: ByteLevel"):
        Tokenizer.load(tmp_path)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hi "},
    {"role": "assistant", "content": "yes", "tool_calls": None},
    {"role": "user", "content": "more"},
]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("name", ["plain", "metaspace", "saved_again"])
def test_chats_are_rendered_as_transformers_does(
    name: str, prompt: bool, pairs: dict[str, Pair]
) -> None:
    pair = pairs[name]
    assert pair.ours.chat_templates().names
    text = pair.ours.apply_chat_template(MESSAGES, add_generation_prompt=prompt)
    expected = pair.theirs.apply_chat_template(
        MESSAGES, add_generation_prompt=prompt, tokenize=False
    )
    assert text == expected
    ids = pair.theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt)["input_ids"]
    assert pair.ours.encode(text, add_special_tokens=False) == ids


def test_templates_of_files_win(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("tools {{ tools | tojson }}")
    pair = Pair(tmp_path)
    for tools in (None, [{"type": "function", "function": {"name": "f"}}]):
        expected = pair.theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
        assert pair.ours.apply_chat_template(MESSAGES, tools=tools) == expected
    assert pair.ours.apply_chat_template(MESSAGES, chat_template="tool_use") == "tools null"


def test_a_list_of_named_templates(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    named = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "rag", "template": "rag"}]
    edit_config(tmp_path, chat_template=named)
    pair = Pair(tmp_path)
    expected = pair.theirs.apply_chat_template(MESSAGES, tokenize=False)
    assert pair.ours.apply_chat_template(MESSAGES, add_generation_prompt=False) == expected
    assert pair.ours.apply_chat_template(MESSAGES, chat_template="rag") == "rag"
    edit_config(tmp_path, chat_template=named[1:])
    with pytest.raises(RequestError, match=r"no default one; name one of: rag"):
        Tokenizer.load(tmp_path).apply_chat_template(MESSAGES)


def test_no_template_is_an_error_of_the_request(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    edit_config(tmp_path, chat_template="absent")
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.chat_templates().names
    with pytest.raises(RequestError, match="the model has no chat template"):
        tokenizer.apply_chat_template(MESSAGES)
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="x{{ 1 + 1 }}") == "x2"


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, lorikeet.client.intake, lorikeet.client.reply;"
        "assert not {'torch', 'transformers', 'xgrammar'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
