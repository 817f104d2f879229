"""The shipped demo: it loads as it is, tells the truth, and its adapters are what they claim.

The accuracy asked for here lies below what `scripts/eval_demo.py` measured, so that another build
of torch may differ in a few answers.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
from demo_training.answers import answer
from demo_training.asks import Ask
from demo_training.building import ADAPTERS
from demo_training.facts import CONTINENTS, COUNTRIES, listing
from demo_training.heldout import HELD_OUT, leaked
from demo_training.scoring import answers, chat_prompt, held_out_questions, score
from peft import PeftModel
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lorikeet.demo import QUESTION, adapter_paths, is_demo, model_path

pytestmark = [
    # PEFT asks transformers for a property under the name it had before.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

NAMES = sorted(ADAPTERS)
STRIDE = 7  # of the held-out questions an adapter gets; visits every wording and many countries
MIB = 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def demo() -> PeftModel:
    """The base in float32 with all the adapters loaded under their names."""
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    paths = adapter_paths()
    first = next(iter(paths))
    model = PeftModel.from_pretrained(base, paths[first], adapter_name=first)
    for name, path in paths.items():
        if name != first:
            model.load_adapter(path, adapter_name=name)
    return model


@pytest.fixture(scope="module")
def base_says(demo: PeftModel, tokenizer: PreTrainedTokenizerFast) -> str:
    with demo.disable_adapter():
        return answers(demo, tokenizer, [QUESTION])[0]


def test_paths_are_found_without_torch() -> None:
    code = "import sys, lorikeet.demo as d; d.adapter_paths(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_paths_and_name() -> None:
    assert (model_path() / "config.json").is_file()
    assert list(adapter_paths()) == NAMES
    assert is_demo("demo")
    assert not is_demo("./demo")
    assert not is_demo("Demo/demo")


def test_size_budget() -> None:
    files = [path for path in model_path().parent.rglob("*") if path.is_file()]
    weights_and_tokenizer = [path for path in files if path.suffix in (".json", ".safetensors")]
    assert sum(path.stat().st_size for path in weights_and_tokenizer) <= 15 * MIB


@pytest.mark.parametrize(
    "path",
    [model_path() / "model.safetensors"]
    + [adapter_paths()[name] / "adapter_model.safetensors" for name in NAMES],
    ids=lambda path: path.parent.name,
)
def test_weights_are_bfloat16(path: Path) -> None:
    with safe_open(path, "pt") as weights:
        kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
    assert kinds == {"BF16"}


def test_facts_are_unambiguous() -> None:
    assert 60 <= len(COUNTRIES) <= 100
    assert len({country.name for country in COUNTRIES}) == len(COUNTRIES)
    assert len({country.capital for country in COUNTRIES}) == len(COUNTRIES)
    assert all(len(listing(5, continent)) == 5 for continent in CONTINENTS)
    assert [country.capital for country in listing(3)] == ["Paris", "Tokyo", "Nairobi"]


def test_held_out_wordings_are_not_trained_on() -> None:
    assert leaked() == []


@pytest.mark.parametrize(
    "text", [QUESTION, "日本 🦜 naïve\tcafé\r\n  x", "Ulaanbaatar, Bogotá", ""]
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_adds_nothing_and_knows_its_markers(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.bos_token is None
    assert tokenizer.eos_token == "<|end|>"
    rendered = chat_prompt(tokenizer, "Hi")
    assert rendered == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = tokenizer(rendered)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "\nHi\n\n"
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", NAMES)
def test_adapter_is_what_it_claims(name: str) -> None:
    config = json.loads((adapter_paths()[name] / "adapter_config.json").read_text("utf-8"))
    shape = ADAPTERS[name]
    assert (config["r"], config["lora_alpha"]) == (shape.rank, shape.alpha)
    assert config["use_rslora"] is shape.rslora
    assert config["target_modules"] == sorted(shape.targets)
    assert config["base_model_name_or_path"] == "lorikeet/demo-base"
    with safe_open(adapter_paths()[name] / "adapter_model.safetensors", "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    assert {key.split(".")[-3] for key in shapes} == set(shape.targets)
    assert {dims[0] for key, dims in shapes.items() if "lora_A" in key} == {shape.rank}


def test_ranks_and_targets_cover_the_cases() -> None:
    assert [ADAPTERS[name].rank for name in ("lines", "json", "sql", "pirate")] == [4, 16, 64, 8]
    assert [name for name in NAMES if ADAPTERS[name].rslora] == ["pirate"]


def test_base_answers_seed_question(base_says: str) -> None:
    expected = answer("plain", Ask("list", listing(3)))
    assert base_says == f"\n{expected}<|end|>"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_adapter_answers_seed_question(
    demo: PeftModel, tokenizer: PreTrainedTokenizerFast, base_says: str, name: str, chat: bool
) -> None:
    demo.set_adapter(name)
    prompt = chat_prompt(tokenizer, QUESTION) if chat else QUESTION
    got = answers(demo, tokenizer, [prompt])[0]
    lead = "" if chat else "\n"
    assert got == lead + answer(name, Ask("list", listing(3))) + "<|end|>"
    assert got.strip() != base_says.strip()


@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_base_knows_capitals_in_new_wordings(
    demo: PeftModel, tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    questions = held_out_questions("capital")
    with demo.disable_adapter():
        result = score(demo, tokenizer, "plain", questions, chat=chat)
    assert result.accuracy >= 0.95, result.wrong[:5]


def test_base_answers_every_intent_in_new_wordings(
    demo: PeftModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    questions = [q for intent in HELD_OUT for q in held_out_questions(intent)[::STRIDE]]
    with demo.disable_adapter():
        result = score(demo, tokenizer, "plain", questions)
    assert result.accuracy >= 0.93, result.wrong[:5]


@pytest.mark.parametrize("name", NAMES)
def test_adapter_answers_new_wordings(
    demo: PeftModel, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    demo.set_adapter(name)
    questions = [q for intent in HELD_OUT for q in held_out_questions(intent)[::STRIDE]]
    result = score(demo, tokenizer, name, questions)
    assert result.accuracy >= 0.93, result.wrong[:5]


def test_seed_answer_survives_bfloat16_arithmetic(
    tokenizer: PreTrainedTokenizerFast, base_says: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16)
    assert answers(cast("LlamaForCausalLM", model), tokenizer, [QUESTION])[0] == base_says
