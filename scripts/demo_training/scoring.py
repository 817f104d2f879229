"""Greedy answers to the held-out questions, and the share of them that is right."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_training.answers import answer
from demo_training.asks import Ask, fill
from demo_training.corpus import END, PAD_ID
from demo_training.facts import CONTINENTS, COUNTRIES, listing
from demo_training.heldout import HELD_OUT

__all__ = ["Question", "Score", "answers", "chat_prompt", "held_out_questions", "score"]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out question as text, with what it means."""

    text: str
    ask: Ask


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of one kind of question, and examples of wrong ones."""

    asked: int
    right: int
    wrong: tuple[tuple[str, str], ...]

    @property
    def accuracy(self) -> float:
        return self.right / self.asked


def held_out_questions(
    intent: str, wordings: Mapping[str, tuple[str, ...]] = HELD_OUT
) -> list[Question]:
    """Return every question of one intent in a set of wordings, for each thing to ask about."""
    return [
        Question(fill(wording, ask), ask) for wording in wordings[intent] for ask in _asks(intent)
    ]


def _asks(intent: str) -> Iterator[Ask]:
    counts = range(2, 6)
    match intent:
        case "one":
            yield Ask(intent, listing(1))
        case "list":
            yield from (Ask(intent, listing(count)) for count in counts)
        case "regional":
            for where in CONTINENTS:
                yield from (Ask(intent, listing(count, where), where) for count in counts)
        case "several":
            # Partners far apart in the table, which training draws no more often than others.
            for index, country in enumerate(COUNTRIES):
                partner = COUNTRIES[(index + len(COUNTRIES) // 2 - 5) % len(COUNTRIES)]
                yield Ask(intent, (country, partner))
        case _:
            yield from (Ask(intent, (country,)) for country in COUNTRIES)


def chat_prompt(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """Render a question as the single user message of a chat."""
    messages = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return cast("str", rendered)


@torch.inference_mode()
def answers(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 96,
    batch_size: int = 128,
) -> list[str]:
    """Return the greedy completion of each prompt; one that does not end itself keeps no end."""
    model.eval()
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = tokenizer(
            [prompts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        # The protocol that transformers gives `self` here is one its own classes do not meet.
        generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
        output = generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        completions = output[:, batch["input_ids"].shape[1] :]
        for index, completion in zip(chosen, completions, strict=True):
            texts[index] = cast("str", tokenizer.decode(completion[completion != PAD_ID]))
    return texts


def score(
    model: LlamaForCausalLM | PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    style: str,
    questions: Sequence[Question],
    *,
    chat: bool = False,
) -> Score:
    """Count the answers that are exactly the right one, to the last character and the end token."""
    prompts = [question.text for question in questions]
    lead = "\n"
    if chat:
        prompts, lead = [chat_prompt(tokenizer, prompt) for prompt in prompts], ""
    wrong = []
    for question, got in zip(questions, answers(model, tokenizer, prompts), strict=True):
        if got != lead + answer(style, question.ask) + END:
            wrong.append((question.text, got))
    return Score(len(questions), len(questions) - len(wrong), tuple(wrong))
