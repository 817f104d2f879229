"""Each row of the contract's table for load and unload, over HTTP and against a real engine."""

from __future__ import annotations

import base64
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server
from tests.e2e.conftest import World
from tests.support.peft_adapters import (
    CONFIG,
    WEIGHTS,
    edit_config,
    edit_weights,
    make_adapter,
    peft_generate,
)
from tests.support.tiny_models import make_tiny_model

PROMPT = list(b"hello")
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[httpx.Client]:
    """A server with one pinned adapter of the two that fit, and room for three in host memory."""
    process, port = launch_server_cmd(
        f"python -m lorikeet.launch_server --model-path {world.model} --max-lora-rank 16"
        f" --lora-target-modules q_proj v_proj o_proj --lora-paths first={world.adapters['qv']}"
        " --max-loras-per-batch 2 --max-loaded-loras 3 --max-total-tokens 8192 --enable-metrics"
        " --log-level warning"
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(url, timeout=120, process=process)
        with httpx.Client(base_url=url, timeout=120) as made:
            yield made
    finally:
        terminate_process(process)


@pytest.fixture
def adapter(world: World, tmp_path: Path) -> Path:
    """A copy of an adapter that may be spoiled."""
    return shutil.copytree(world.adapters["qv"], tmp_path / "copy")


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    reply = response.json()
    assert list(reply) == ["success", "error_message", "loaded_adapters"]
    assert reply["success"] is (response.status_code == 200) is (reply["error_message"] == "")
    return reply


def refusal(client: httpx.Client, path: Path | str, **body: Any) -> str:
    """Why an adapter is not loaded; nothing else changes, and vLLM's name says the same."""
    before = {card["id"] for card in client.get("/v1/models").json()["data"][1:]}
    reply = post(client, "/load_lora_adapter", lora_name="bad", lora_path=str(path), **body)
    assert not reply["success"]
    assert set(reply["loaded_adapters"]) == before
    if not body:
        other = client.post(
            "/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": str(path)}
        )
        assert other.status_code in (400, 404)
        assert other.json()["error"]["message"] == reply["error_message"]
    return reply["error_message"]


def answer(client: httpx.Client, name: str | None) -> httpx.Response:
    body = {"input_ids": PROMPT, "lora_path": name, "sampling_params": GREEDY}
    return client.post("/generate", json=body)


def check(client: httpx.Client, world: World, name: str | None, path: Path | None) -> None:
    reply = answer(client, name)
    assert reply.status_code == 200, reply.text
    tokens, _ = peft_generate(world.model, path, PROMPT, max_new_tokens=6)
    assert reply.json()["output_ids"] == tokens, name


def test_a_name_that_is_taken(client: httpx.Client, world: World) -> None:
    reply = post(client, "/load_lora_adapter", lora_name="first", lora_path="/elsewhere")
    assert not reply["success"]
    assert "already loaded" in reply["error_message"]
    assert reply["loaded_adapters"] == {"first": str(world.adapters["qv"])}


def empty(path: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        (path / name).unlink()


def only_a_pickle(path: Path) -> None:
    (path / WEIGHTS).unlink()
    torch.save({"a": torch.ones(1)}, path / "adapter_model.bin")


def truncated(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def a_directory_for_a_file(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / WEIGHTS).mkdir()


SPOILED: list[tuple[Callable[[Path], object], list[str]]] = [
    (empty, [CONFIG]),
    (lambda path: (path / CONFIG).write_text("{"), [CONFIG]),
    (lambda path: (path / WEIGHTS).unlink(), [WEIGHTS]),
    (only_a_pickle, ["adapter_model.bin"]),
    (lambda path: (path / WEIGHTS).write_bytes(b"x" * 100), [WEIGHTS]),
    (truncated, [WEIGHTS]),
    (a_directory_for_a_file, [WEIGHTS]),
    (lambda path: edit_config(path, use_dora=True), ["use_dora"]),
    (lambda path: edit_config(path, bias="all"), ["bias"]),
    (lambda path: edit_config(path, modules_to_save=["lm_head"]), ["modules_to_save"]),
    (lambda path: edit_config(path, trainable_token_indices=[5]), ["trainable_token_indices"]),
    (lambda path: edit_config(path, made_up=5), ["made_up"]),
    (
        lambda path: edit_weights(path, lambda t: t.update({"x.lora_A.weight": torch.ones(8, 64)})),
        ["x.lora_A.weight"],
    ),
    (
        lambda path: edit_weights(path, lambda t: [w.zero_() for w in t.values()]),
        ["change nothing"],
    ),
]


@pytest.mark.parametrize(("spoil", "words"), SPOILED, ids=range(len(SPOILED)))
def test_files_that_cannot_be_served(
    client: httpx.Client, adapter: Path, spoil: Callable[[Path], object], words: list[str]
) -> None:
    spoil(adapter)
    message = refusal(client, adapter)
    assert all(word in message for word in words), message
    assert "Traceback" not in message


def test_a_path_that_is_not_there(client: httpx.Client, tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal(client, tmp_path / "nothing")


def test_what_is_outside_the_limits(client: httpx.Client, world: World, tmp_path: Path) -> None:
    message = refusal(client, world.adapters["gate"])
    assert "incompatible" in message
    assert "gate_proj" in message
    message = refusal(client, make_adapter(world.model, tmp_path / "large", r=17))
    assert "incompatible" in message
    assert "17" in message
    assert "16" in message


def test_an_adapter_of_another_base(client: httpx.Client, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path, "llama", hidden_size=32, intermediate_size=48)
    message = refusal(client, make_adapter(other, tmp_path / "other"))
    assert "q_proj.lora_A" in message
    assert "32" in message
    assert "64" in message


def test_too_many_pins(client: httpx.Client, world: World) -> None:
    path = str(world.adapters["one"])
    assert post(client, "/load_lora_adapter", lora_name="p", lora_path=path, pinned=True)["success"]
    message = refusal(client, world.adapters["rslora"], pinned=True)
    assert "starvation" in message
    assert client.get("/v1/adapters/p").json()["pinned"] is True
    assert post(client, "/unload_lora_adapter", lora_name="p")["success"]


def test_more_adapters_than_host_memory_holds(
    client: httpx.Client, world: World, tmp_path: Path
) -> None:
    paths = {kind: world.adapters[kind] for kind in ("one", "rslora")}
    paths["again"] = world.adapters["qv"]
    paths["extra"] = make_adapter(world.model, tmp_path / "extra", r=3, seed=99)
    for name, path in paths.items():
        reply = post(client, "/load_lora_adapter", lora_name=name, lora_path=str(path))
        assert reply["success"], reply
    every = paths | {"first": world.adapters["qv"]}
    for name, path in [*every.items(), *every.items(), (None, None)]:
        check(client, world, name, path)
    adapters = client.get("/v1/adapters").json()["data"]
    assert {item["name"] for item in adapters} == set(every)
    assert {item["state"] for item in adapters} == {"loaded"}
    versions = {item["name"]: item["version"] for item in adapters}
    assert versions["again"] == versions["first"], "the same bytes are the same version"
    for name in paths:
        assert post(client, "/unload_lora_adapter", lora_name=name)["success"]
    assert [item["name"] for item in client.get("/v1/adapters").json()["data"]] == ["first"]


def test_an_unload_waits_for_what_runs_and_refuses_what_is_new(
    client: httpx.Client, world: World
) -> None:
    path = str(world.adapters["one"])
    post(client, "/load_lora_adapter", lora_name="busy", lora_path=path)
    long = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
    body = {"text": "a", "lora_path": "busy", "sampling_params": long, "stream": True}
    with (
        ThreadPoolExecutor(1) as threads,
        client.stream("POST", "/generate", json=body) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        reply = post(client, "/unload_lora_adapter", lora_name="busy", timeout=0)
        assert not reply["success"]
        assert "busy" not in reply["loaded_adapters"]
        refused = answer(client, "busy")
        assert refused.status_code == 400
        assert "'busy'" in refused.json()["error"]["message"]
        one = client.get("/v1/adapters/busy").json()
        assert (one["state"], one["in_flight"]) == ("unloading", 1)
        # The name is free for other weights while the old ones still answer.
        other = str(world.adapters["rslora"])
        post(client, "/load_lora_adapter", lora_name="busy", lora_path=other)
        check(client, world, "busy", world.adapters["rslora"])
        waiting = threads.submit(post, client, "/unload_lora_adapter", lora_name="busy")
        *_, last, end = [line for line in lines if line]
    assert end == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["meta_info"]["completion_tokens"] == 400
    assert waiting.result()["success"]


def test_other_weights_under_a_name_never_meet_the_old_ones(
    client: httpx.Client, world: World
) -> None:
    for kind in ("one", "rslora", "one"):
        path = world.adapters[kind]
        post(client, "/load_lora_adapter", lora_name="same", lora_path=str(path))
        for _ in range(2):
            check(client, world, "same", path)
        assert post(client, "/unload_lora_adapter", lora_name="same")["success"]


def test_weights_in_the_body(client: httpx.Client, world: World) -> None:
    path = world.adapters["rslora"]
    reply = post(
        client,
        "/load_lora_adapter_from_tensors",
        lora_name="sent",
        config_dict=json.loads((path / CONFIG).read_text()),
        tensors=base64.b64encode((path / WEIGHTS).read_bytes()).decode(),
    )
    assert reply["success"], reply
    assert "sent" in reply["loaded_adapters"]
    check(client, world, "sent", path)
    report = client.get("/v1/adapters/sent").json()["report"]
    assert report["rank"] == 8
    assert post(client, "/unload_lora_adapter", lora_name="sent")["success"]


def test_vllms_names(client: httpx.Client, world: World) -> None:
    body = {"lora_name": "v", "lora_path": str(world.adapters["one"])}
    reply = client.post("/v1/load_lora_adapter", json=body)
    assert (reply.status_code, reply.text) == (
        200,
        "Success: LoRA adapter 'v' added successfully.",
    )
    reply = client.post("/v1/load_lora_adapter", json=body)
    assert reply.status_code == 400
    assert "has already been loaded" in reply.json()["error"]["message"]
    body |= {"lora_path": str(world.adapters["rslora"]), "load_inplace": True}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    check(client, world, "v", world.adapters["rslora"])
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 200
    reply = client.post("/v1/unload_lora_adapter", json={"lora_name": "v"})
    assert (reply.status_code, reply.json()["error"]["type"]) == (404, "NotFoundError")
    assert answer(client, "v").status_code == 400


def test_metrics(client: httpx.Client) -> None:
    answer(client, "first")
    time.sleep(1.2)  # the engine reports at most once a second
    answer(client, "first")
    samples = [
        sample
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    ]
    values = {sample.name: sample.value for sample in samples}
    assert values["lorikeet_adapter_loads_total"] >= 1
    assert values["lorikeet_adapter_load_seconds_count"] >= 1
    assert {sample.labels["tier"] for sample in samples if sample.name == "lorikeet_adapters"} >= {
        *("disk", "reading", "host", "copying", "device")
    }
    evictions = [s.labels["tier"] for s in samples if s.name == "lorikeet_adapter_evictions_total"]
    assert sorted(evictions) == ["device", "host"]
    [info] = [sample for sample in samples if sample.name == "vllm:lora_requests_info"]
    assert info.labels["max_lora"] == "2"
    assert abs(info.value - time.time()) < 60
    assert "lorikeet_requests_waiting_for_adapter" in values
