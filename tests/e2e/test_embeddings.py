"""Vectors of the whole engine against transformers and PEFT, one prompt at a time: beside generation, in chunks, with a
cached prefix, after a preemption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from lorikeet import LLM
from lorikeet.client.reply import vector_floats
from lorikeet.core.request import Pooling, Request, RequestOutput, SamplingParams
from lorikeet.errors import EngineFault, RequestError
from tests.e2e.conftest import World
from tests.e2e.test_overlap import no_memory
from tests.e2e.test_parity import prompts
from tests.support.failing_steps import fail_steps, first, worker_of
from tests.support.peft_adapters import make_adapter, peft_generate, peft_states
from tests.support.tiny_models import FAMILIES, make_tiny_model

MakeLLM = Callable[..., LLM]
Kind = Literal["last", "mean"]
NAMES = [None, "qv", "big", "head", "qv", None, "mlp"]
ADAPTERS = ("qv", "big", "head", "mlp")


def expected(
    world: World, name: str | None, ids: list[int], kind: Kind, *, normalize: bool = True
) -> list[float]:
    states = peft_states(world.model, world.path(name), ids)
    vector = states[-1] if kind == "last" else states.mean(0)
    return (vector / vector.norm() if normalize else vector).tolist()


def check(world: World, found: list[list[float]], ids: list[list[int]], kind: Kind) -> None:
    assert len(found) == len(ids)
    for vector, name, prompt in zip(found, NAMES, ids, strict=True):
        assert vector == pytest.approx(expected(world, name, prompt, kind), abs=2e-5), name


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disable_radix_cache": True},
        {"chunked_prefill_size": 7},
        {"page_size": 1, "chunked_prefill_size": 16},
        {"max_total_tokens": 96},
        {"max_running_requests": 2, "schedule_policy": "lpm"},
        {"max_loras_per_batch": 1},
    ],
    ids=str,
)
def test_vectors_equal_peft(
    world: World, make_llm: MakeLLM, kind: Kind, overlap: bool, options: dict[str, Any]
) -> None:
    llm = make_llm(*ADAPTERS, **options)
    worker_of(llm).max_ahead = int(overlap)
    ids = prompts(len(NAMES))
    for _ in range(2):  # the second time with what the first has cached
        check(world, llm.embed(input_ids=ids, lora_path=NAMES, pooling=kind), ids, kind)
        llm._core.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Any) -> None:
    model = make_tiny_model(tmp_path, family)
    path = make_adapter(model, tmp_path / "a", r=8, targets=["q_proj", "v_proj"], seed=3)
    llm = LLM(str(model), lora_paths={"a": str(path)}, max_total_tokens=512)
    small = World(model, {"a": path})
    ids = prompts(2)
    for kind in ("last", "mean"):
        found = llm.embed(input_ids=ids, lora_path=["a", None], pooling=kind, normalize=False)
        for vector, name, prompt in zip(found, ["a", None], ids, strict=True):
            right = expected(small, name, prompt, kind, normalize=False)
            assert vector == pytest.approx(right, abs=1e-4)


def test_a_cached_prefix_serves_the_last_state_and_never_a_mean(make_llm: MakeLLM) -> None:
    llm = make_llm("qv", page_size=4)
    prompt = prompts(1, low=40, high=40)[0]
    llm.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1}, lora_path="qv")
    cached: dict[str, int] = {}
    for kind in ("last", "mean"):
        ((output,),) = run(llm, [vector_request(prompt, "qv", Pooling(kind=kind))])
        cached[kind] = output.cached_tokens
    assert cached == {"last": 36, "mean": 0}
    # What a vector has computed, a completion may use.
    llm.flush_cache()
    llm.embed(input_ids=prompt, lora_path="qv", pooling="mean")
    reply = llm.generate(input_ids=prompt, sampling_params={"max_new_tokens": 1}, lora_path="qv")
    assert reply["meta_info"]["cached_tokens"] == 36


def vector_request(ids: list[int], name: str | None, pooling: Pooling) -> Request:
    sampling = SamplingParams(max_new_tokens=0)
    return Request(prompt_token_ids=ids, sampling=sampling, adapter=name, pooling=pooling)


def run(
    llm: LLM, requests: list[Request], *, abort: tuple[int, ...] = ()
) -> list[list[RequestOutput]]:
    """The outputs of each request; those in these places are aborted."""
    ids = [llm._core.submit(request) for request in requests]
    outputs: list[RequestOutput] = []
    for _ in range(3):
        outputs += llm._core.step()
    for place in abort:
        llm._core.abort(ids[place], "enough")
    while not llm._core.is_idle:
        outputs += llm._core.step()
    llm._core.check_integrity()
    return [[output for output in outputs if output.id == number] for number in ids]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_total_tokens": 128}], ids=str)
def test_vectors_and_completions_share_their_steps(
    world: World, make_llm: MakeLLM, overlap: bool, options: dict[str, int]
) -> None:
    llm = make_llm(*ADAPTERS, chunked_prefill_size=16, page_size=4, **options)
    worker = worker_of(llm)
    worker.max_ahead = int(overlap)
    plans: list[Any] = []
    submit = worker.submit
    worker.submit = lambda plan: (plans.append(plan), submit(plan))[1]
    # Three steps read no more than 48 tokens: those two are under way, or wait, when they are aborted.
    ids = [*prompts(19), *prompts(2, low=60, high=60)]
    greedy = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
    requests: list[Request] = []
    for number, prompt in enumerate(ids):
        name = NAMES[number % 7]
        if number % 3:
            pooling = Pooling(kind="mean" if number % 3 == 1 else "last")
            requests.append(vector_request(prompt, name, pooling))
        else:
            requests.append(Request(prompt_token_ids=prompt, sampling=greedy, adapter=name))
    outputs = run(llm, requests, abort=(19, 20))
    assert any(plan.rows and any(c.pool for c in plan.chunks) for plan in plans)
    assert any(len({c.pool for c in plan.chunks}) == 2 for plan in plans)
    assert not any(chunk.sample and chunk.pool for plan in plans for chunk in plan.chunks)
    for number, (request, mine) in enumerate(zip(requests, outputs, strict=True)):
        tokens = [token for output in mine for token in output.token_ids]
        (finish,) = [output.finish for output in mine if output.finish]
        prompt, name = request.prompt_token_ids, request.adapter
        if number in (19, 20):
            assert (finish.kind, mine[-1].embedding) == ("abort", None)
        elif request.pooling is None:
            assert mine[-1].embedding is None
            assert (
                tokens == peft_generate(world.model, world.path(name), prompt, max_new_tokens=24)[0]
            )
        else:
            assert (finish.kind, finish.length, tokens) == ("length", 0, [])
            right = expected(world, name, prompt, request.pooling.kind)
            assert mine[-1].embedding is not None
            assert vector_floats(mine[-1].embedding) == pytest.approx(right, abs=2e-5)
    if options:
        assert llm._core.stats()["total_preemptions"] > 0
    assert not worker._pooler._states


def test_texts_shapes_and_defaults(world: World, make_llm: MakeLLM) -> None:
    llm = make_llm("qv")
    one = llm.embed("some text")
    tokens = llm.tokenizer.encode("some text")
    assert one == pytest.approx(expected(world, None, tokens, "last"), abs=2e-5)
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-5)
    both = llm.embed(["some text", "x"], lora_path=["qv", None], pooling="mean", normalize=False)
    right = expected(world, "qv", tokens, "mean", normalize=False)
    assert both[0] == pytest.approx(right, abs=1e-4)
    assert len(both) == 2


def test_a_prompt_may_fill_the_context(world: World, make_llm: MakeLLM) -> None:
    llm = make_llm(context_length=32)
    prompt = prompts(1, low=32, high=32)[0]
    found = llm.embed(input_ids=prompt, pooling="mean")
    assert found == pytest.approx(expected(world, None, prompt, "mean"), abs=2e-5)
    with pytest.raises(
        RequestError, match="33 tokens; allowed: at most 32, because the maximum context"
    ):
        llm.embed(input_ids=[*prompt, 1])


def test_what_is_refused(make_llm: MakeLLM) -> None:
    llm = make_llm("qv")
    wrong: Any = "max"
    with pytest.raises(RequestError, match="pooling is 'max'; allowed: last, mean"):
        llm.embed("x", pooling=wrong)
    with pytest.raises(RequestError, match="'nobody' has never been loaded"):
        llm.embed("x", lora_path="nobody")
    with pytest.raises(RequestError, match="text is an empty list"):
        llm.embed([])


def test_a_step_without_memory_is_computed_again(
    world: World, make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm("qv", chunked_prefill_size=16)
    prompt = prompts(1, low=40, high=40)[0]
    worker = worker_of(llm)
    launch = worker._pooler.launch
    fails = iter([False, True, False, False])

    def failing(*args: Any) -> Any:
        pending = launch(*args)
        if next(fails):
            no_memory()  # after its states were taken in
        return pending

    monkeypatch.setattr(worker._pooler, "launch", failing)
    found = llm.embed(input_ids=prompt, lora_path="qv", pooling="mean")
    assert found == pytest.approx(expected(world, "qv", prompt, "mean"), abs=2e-5)
    fail_steps(llm, monkeypatch, no_memory, first(2))
    with pytest.raises(EngineFault, match="no memory for a step of 16 tokens"):
        llm.embed(input_ids=prompt, lora_path="qv", pooling="mean")
    llm._core.check_integrity()


def test_states_that_are_not_finite_are_no_vector(
    make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm()
    network: Any = worker_of(llm)._model
    pooled = network.forward_pooled

    def broken(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, states = pooled(batch)
        states[0] = torch.nan
        return logits, states

    monkeypatch.setattr(network, "forward_pooled", broken)
    requests = [vector_request([ord(c) for c in name], None, Pooling(kind="mean")) for name in "ab"]
    first, second = (outputs[-1] for outputs in run(llm, requests))
    assert first.finish is not None
    assert first.finish.status_code == 500
    assert "not finite" in (first.finish.message or "")
    assert first.embedding is None
    assert second.embedding is not None, "the other one is none the worse for it"
