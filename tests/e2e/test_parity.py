"""Mixed batches of the whole engine against PEFT, one request at a time."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from lorikeet import LLM
from tests.e2e.conftest import KINDS, World
from tests.support.failing_steps import worker_of
from tests.support.peft_adapters import make_adapter, peft_generate
from tests.support.tiny_models import FAMILIES, make_tiny_model

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def prompts(count: int, *, low: int = 3, high: int = 40) -> list[list[int]]:
    chance = random.Random(7)
    return [[chance.randrange(256) for _ in range(chance.randint(low, high))] for _ in range(count)]


def check(world: World, names: list[str | None], ids: list[list[int]], replies: list[dict]) -> None:
    assert len(replies) == len(names)
    for name, prompt, reply in zip(names, ids, replies, strict=True):
        tokens, logprobs = peft_generate(world.model, world.path(name), prompt)
        assert reply["output_ids"] == tokens, name
        ours = [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
        assert ours == pytest.approx(logprobs, abs=2e-3), name
        assert reply["meta_info"]["lora_name"] == name


def test_base_and_twelve_adapters_with_room_for_four(
    world: World, make_llm: Callable[..., LLM]
) -> None:
    llm = make_llm(*KINDS, max_loras_per_batch=4)
    names = [None, *KINDS]
    ids = prompts(len(names))
    replies = llm.generate(
        input_ids=ids, sampling_params=GREEDY, lora_path=names, return_logprob=True
    )
    check(world, names, ids, replies)
    llm._core.check_integrity()


def test_one_slot_serves_every_adapter_in_turn(world: World, make_llm: Callable[..., LLM]) -> None:
    llm = make_llm(*KINDS, max_loras_per_batch=1)
    names = [*KINDS, None, *reversed(KINDS)]
    ids = prompts(len(names))
    replies = llm.generate(
        input_ids=ids, sampling_params=GREEDY, lora_path=names, return_logprob=True
    )
    check(world, names, ids, replies)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path) -> None:
    model = make_tiny_model(tmp_path, family)
    kinds = ["qv", "patterns", "head"]
    adapters = {
        name: make_adapter(model, tmp_path / name, seed=seed, **KINDS[name])
        for seed, name in enumerate(kinds)
    }
    llm = LLM(
        str(model),
        lora_paths={name: str(path) for name, path in adapters.items()},
        max_total_tokens=2048,
        chunked_prefill_size=16,
    )
    names = [*kinds, None, "qv"]
    ids = prompts(len(names))
    replies = llm.generate(
        input_ids=ids, sampling_params=GREEDY, lora_path=names, return_logprob=True
    )
    check(World(model, adapters), names, ids, replies)


def test_a_row_does_not_depend_on_who_shares_the_batch(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm("qv", "big", "mlp", "head", disable_radix_cache=True)
    ids = prompts(6)
    alone = llm.generate(
        input_ids=ids[0], sampling_params=GREEDY, lora_path="qv", return_logprob=True
    )
    for others in (["big"] * 5, [None] * 5, ["qv"] * 5, ["big", "mlp", "head", None, "qv"]):
        shared = llm.generate(
            input_ids=ids,
            sampling_params=GREEDY,
            lora_path=["qv", *others],
            return_logprob=True,
        )[0]
        assert shared["output_ids"] == alone["output_ids"]
        for one, other in zip(
            shared["meta_info"]["output_token_logprobs"],
            alone["meta_info"]["output_token_logprobs"],
            strict=True,
        ):
            assert one[0] == pytest.approx(other[0], abs=1e-4)


def test_prompt_logprobs_equal_peft(world: World, make_llm: Callable[..., LLM]) -> None:
    from tests.support.peft_adapters import peft_logits

    llm = make_llm("all", chunked_prefill_size=8)
    prompt = prompts(1, low=30, high=30)[0]
    reply = llm.generate(
        input_ids=prompt,
        sampling_params=GREEDY,
        lora_path="all",
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=3,
    )
    rows = peft_logits(world.model, world.adapters["all"], prompt).log_softmax(-1)
    ours = reply["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in ours] == prompt
    assert ours[0][0] is None
    expected = [float(rows[i, token]) for i, token in enumerate(prompt[1:])]
    assert [entry[0] for entry in ours[1:]] == pytest.approx(expected, abs=2e-3)
    tops = reply["meta_info"]["input_top_logprobs"]
    assert [entry[1] for entry in tops[5]] == rows[4].topk(3).indices.tolist()


@pytest.mark.parametrize("kind", ["head", "all"])
def test_prompt_logprobs_in_pieces(
    kind: str, make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of many positions are computed a few rows at a time, with each row's own adapter, for the same results."""
    llm = make_llm(kind, "qv", max_running_requests=4, disable_radix_cache=True)
    worker = worker_of(llm)
    assert worker._max_logits_rows == 64
    ids = [*prompts(3, low=60, high=90), [7]]

    def replies() -> list[dict]:
        return llm.generate(
            input_ids=ids,
            sampling_params=GREEDY,
            lora_path=[kind, None, "qv", kind],
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=3,
        )

    sizes: list[int] = []
    head = worker._model.head
    monkeypatch.setattr(
        worker._model, "head", lambda x_ND, batch: (sizes.append(len(x_ND)), head(x_ND, batch))[1]
    )
    pieces = replies()
    num_wanted = sum(len(prompt) - 1 for prompt in ids)
    # Rows that decode beside them come with the rows that are sampled from.
    assert sum(sizes) >= num_wanted + len(ids)
    assert max(sizes) == 64
    worker._max_logits_rows = 10**6
    for one, other, prompt in zip(pieces, replies(), ids, strict=True):
        assert one["output_ids"] == other["output_ids"]
        for key in ("input_token_logprobs", "output_token_logprobs"):
            found, wanted = one["meta_info"][key], other["meta_info"][key]
            assert [entry[1] for entry in found] == [entry[1] for entry in wanted]
            values = [entry[0] and pytest.approx(entry[0], abs=1e-4) for entry in wanted]
            assert [entry[0] for entry in found] == values
        tops = [one["meta_info"]["input_top_logprobs"], other["meta_info"]["input_top_logprobs"]]
        assert len(tops[0]) == len(prompt)
        assert [[e and e[1] for e in top or ()] for top in tops[0]] == [
            [e and e[1] for e in top or ()] for top in tops[1]
        ]
