"""The flow of SGLang's LoRA notebook, sections on one and on several adapters, with the names changed."""

from __future__ import annotations

import json

import httpx
import pytest

from lorikeet.utils import launch_server_cmd, terminate_process, wait_for_server
from tests.e2e.conftest import World


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
