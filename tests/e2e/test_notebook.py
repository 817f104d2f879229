"""The flow of SGLang's LoRA notebook with the names changed: adapters at start, at run time, replaced and pinned."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server
from tests.e2e.conftest import World
from tests.support.peft_adapters import LINEAR, make_adapter, peft_generate

PROMPT = [list(b"List 3 countries and their capitals."), list(b"AI is a field of")]
RANKS = (4, 64, 256)
GREEDY = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def ranks(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Adapters by rank."""
    root = tmp_path_factory.mktemp("ranks")
    return {
        rank: make_adapter(
            world.model,
            root / f"rank{rank}",
            r=rank,
            targets=["q_proj", "v_proj"] if rank == 4 else LINEAR,
            seed=rank,
        )
        for rank in RANKS
    }


@contextmanager
def server(command: str) -> Iterator[httpx.Client]:
    """A server of the command line, and a client of it."""
    process, port = launch_server_cmd(command)
    try:
        wait_for_server(f"http://localhost:{port}", process=process)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        terminate_process(process)


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """The reply of SGLang's form, which agrees with its status."""
    response = client.post(path, json=body)
    reply = response.json()
    assert set(reply) == {"success", "error_message", "loaded_adapters"}
    assert reply["success"] is (response.status_code == 200) is (reply["error_message"] == "")
    return reply


def check_answers(
    client: httpx.Client, model: Path, adapters: list[tuple[str | None, Path | None]]
) -> None:
    """One call with a prompt for each adapter, answered as PEFT answers it."""
    prompts = [PROMPT[index % len(PROMPT)] for index in range(len(adapters))]
    response = client.post(
        "/generate",
        json={
            "input_ids": prompts,
            "sampling_params": GREEDY,
            "lora_path": [name for name, _ in adapters],
        },
    )
    assert response.status_code == 200, response.text
    for prompt, (name, path), reply in zip(prompts, adapters, response.json(), strict=True):
        tokens, _ = peft_generate(model, path, prompt, max_new_tokens=6)
        assert reply["output_ids"] == tokens, name
        assert reply["meta_info"]["lora_name"] == name


def names(client: httpx.Client) -> list[str]:
    return [card["id"] for card in client.get("/v1/models").json()["data"]][1:]


@pytest.mark.parametrize("spelling", ["NAME=PATH", "JSON"])
def test_single_and_multiple_adapters(world: World, spelling: str) -> None:
    if spelling == "JSON":
        paths = " ".join(
            json.dumps({"lora_name": f"lora{i}", "lora_path": str(world.adapters[name])})
            for i, name in enumerate(["qv", "big"])
        )
    else:
        paths = f"lora0={world.adapters['qv']} lora1={world.adapters['big']}"
    server_process, port = launch_server_cmd(
        f"""
    python3 -m lorikeet.launch_server --model-path {world.model} \\
        --enable-lora \\
        --lora-paths {paths} \\
        --max-loras-per-batch 2 \\
        --log-level warning
    """
    )
    try:
        wait_for_server(f"http://localhost:{port}", process=server_process)
        url = f"http://127.0.0.1:{port}"
        json_data = {
            "text": [
                "List 3 countries and their capitals.",
                "List 3 countries and their capitals.",
                "AI is a field of computer science focused on",
            ],
            "sampling_params": {"max_new_tokens": 32, "temperature": 0},
            # The first input uses lora0, the second none, the third lora1.
            "lora_path": ["lora0", None, "lora1"],
        }
        response = httpx.post(url + "/generate", json=json_data, timeout=60)
        assert response.status_code == 200
        names = [reply["meta_info"]["lora_name"] for reply in response.json()]
        assert names == ["lora0", None, "lora1"]
        assert response.json()[0]["text"] != response.json()[1]["text"]
    finally:
        terminate_process(server_process)


def test_dynamic_loading_and_unloading(world: World, ranks: dict[int, Path]) -> None:
    command = f"""
    python3 -m lorikeet.launch_server --model-path {world.model} \\
        --enable-lora \\
        --cuda-graph-max-bs 2 \\
        --max-loras-per-batch 2 \\
        --max-lora-rank 256 \\
        --lora-target-modules all \\
        --max-total-tokens 4096 \\
        --log-level warning
    """
    with server(command) as client:
        check_answers(client, world.model, [(None, None)])
        assert names(client) == []
        paths = {"lora0": str(ranks[4]), "lora1": str(ranks[64])}
        for name, path in paths.items():
            post(client, "/load_lora_adapter", lora_name=name, lora_path=path)
        assert names(client) == ["lora0", "lora1"]
        both = [("lora0", ranks[4]), ("lora1", ranks[64])]
        check_answers(client, world.model, [*both, (None, None)])

        reply = post(client, "/unload_lora_adapter", lora_name="lora0")
        assert (reply["success"], reply["loaded_adapters"]) == (True, {"lora1": paths["lora1"]})
        response = client.post("/generate", json={"text": "a", "lora_path": "lora0"})
        assert response.status_code == 400
        assert "lora0" in response.json()["error"]["message"]

        # The same name with other weights, as large as allowed.
        reply = post(client, "/load_lora_adapter", lora_name="lora0", lora_path=str(ranks[256]))
        assert reply["loaded_adapters"] == paths | {"lora0": str(ranks[256])}
        check_answers(client, world.model, [("lora0", ranks[256]), ("lora1", ranks[64])])

        # Replaced under its name without an unload, as vLLM does it.
        body = {"lora_name": "lora0", "lora_path": str(ranks[4])}
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
        response = client.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
        assert response.text == "Success: LoRA adapter 'lora0' added successfully."
        check_answers(client, world.model, both)

        # A third adapter in two places: all three are answered, two at a time.
        post(client, "/load_lora_adapter", lora_name="lora2", lora_path=str(ranks[256]))
        check_answers(client, world.model, [*both, ("lora2", ranks[256]), (None, None)])
        adapters = client.get("/v1/adapters").json()["data"]
        assert {item["name"]: item["rank"] for item in adapters} == {
            "lora0": 4,
            "lora1": 64,
            "lora2": 256,
        }


def test_pinning_at_start_and_at_load(world: World, ranks: dict[int, Path]) -> None:
    pinned = json.dumps({"lora_name": "lora0", "lora_path": str(ranks[4]), "pinned": True})
    command = f"""
    python3 -m lorikeet.launch_server --model-path {world.model} \\
        --enable-lora \\
        --max-loras-per-batch 3 \\
        --max-lora-rank 256 \\
        --lora-target-modules all \\
        --lora-paths {pinned} lora1={ranks[64]} \\
        --max-total-tokens 4096 \\
        --log-level warning
    """
    with server(command) as client:
        reply = post(
            client,
            "/load_lora_adapter",
            lora_name="lora2",
            lora_path=str(ranks[256]),
            pinned=True,
        )
        assert reply["success"]
        reply = post(
            client,
            "/load_lora_adapter",
            lora_name="x",
            lora_path=str(world.adapters["all"]),
            pinned=True,
        )
        assert not reply["success"]
        assert "starvation" in reply["error_message"]
        assert list(reply["loaded_adapters"]) == ["lora0", "lora1", "lora2"]
        post(client, "/load_lora_adapter", lora_name="x", lora_path=str(world.adapters["all"]))
        every = [("lora0", ranks[4]), ("lora1", ranks[64]), ("lora2", ranks[256])]
        everyone = [*every, ("x", world.adapters["all"]), (None, None)]
        check_answers(client, world.model, everyone)
        check_answers(client, world.model, everyone[::-1])
        adapters = {item["name"]: item for item in client.get("/v1/adapters").json()["data"]}
        assert {name: item["pinned"] for name, item in adapters.items()} == {
            "lora0": True,
            "lora1": False,
            "lora2": True,
            "x": False,
        }
        for name in ("lora0", "lora2"):
            one = client.get(f"/v1/adapters/{name}").json()
            assert one["tier"] == "device", "pinned: resident, whoever else was served"
        assert client.get("/v1/adapters/nobody").status_code == 404
