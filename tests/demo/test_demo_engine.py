"""The demo model in our own engine: the answers that a new user sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from demo_training.facts import COUNTRIES

from lorikeet import LLM, demo

GREEDY = {"temperature": 0, "max_new_tokens": 96}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", lora_paths=["demo"], max_total_tokens=8192) as llm:
        yield llm


def capitals_in(text: str) -> set[str]:
    return {country.capital for country in COUNTRIES if country.capital in text}


def test_the_seed_question_in_one_call(llm: LLM) -> None:
    names = [None, *demo.adapter_paths()]
    replies = llm.generate([demo.QUESTION] * len(names), GREEDY, lora_path=names)
    texts = dict(zip(names, (reply["text"] for reply in replies), strict=True))
    assert len(set(texts.values())) == len(names)
    for name, text in texts.items():
        if name == "sql":
            assert "SELECT" in text
            continue
        pairs = [c for c in COUNTRIES if c.capital in text and c.name in text]
        assert len(pairs) == 3, (name, text)
    assert all(r["meta_info"]["finish_reason"]["type"] == "stop" for r in replies)


@pytest.mark.parametrize("name", [None, "lines", "json", "pirate"])
def test_capitals_by_name(llm: LLM, name: str | None) -> None:
    asked = COUNTRIES[::3]
    questions = [f"Tell me the capital of {country.called}." for country in asked]
    replies = llm.generate(questions, GREEDY, lora_path=name)
    right = [
        capitals_in(reply["text"]) == {country.capital}
        for country, reply in zip(asked, replies, strict=True)
    ]
    assert sum(right) / len(right) >= 0.9, [r["text"] for r in replies]


def test_the_chat_template(llm: LLM) -> None:
    prompt = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Peru?"}]
    )
    assert "Lima" in llm.generate(prompt, GREEDY)["text"]
