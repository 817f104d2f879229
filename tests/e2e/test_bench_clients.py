"""The serving benchmarks of SGLang and vLLM against a live server.

The slow tests run the clients from the published wheels, unmodified; the others send the same requests in the same
order, and read the replies in the same way, without a download.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lorikeet import demo
from tests.support import bench_client
from tests.support.served import served

ADAPTERS = ("json", "lines", "pirate", "sql")
NUM_PROMPTS = 12
PROMPTS = [f"Question {number}: where is Oslo?" for number in range(NUM_PROMPTS)]
NUM_OUT = 6
# Which adapter each request names.
ASSIGNMENTS = {
    "uniform": [ADAPTERS[number * 7 % 4] for number in range(NUM_PROMPTS)],
    "distinct": [ADAPTERS[number % 4] for number in range(NUM_PROMPTS)],
    "skewed": ["json"] * 8 + ["lines"] * 3 + ["pirate"],
    "none": [None] * NUM_PROMPTS,
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(
        "--model-path demo --served-model-name parrot --lora-paths demo --max-total-tokens 8192"
    ) as url:
        yield url


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as response:
        assert response.status == 200
        return await response.json()


async def events(session: aiohttp.ClientSession, url: str, body: object) -> list[Any]:
    """What a stream says, read line by line as both clients do."""
    found: list[Any] = []
    is_done = False
    async with session.post(url, json=body, headers={"x-request-id": "r1"}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not (text := line.strip()):
                continue
            assert text.startswith(b"data: ")
            assert not is_done
            is_done = text == b"data: [DONE]"
            if not is_done:
                found.append(json.loads(text.removeprefix(b"data: ")))
    assert is_done
    return found


def sglang_request(backend: str, prompt: str, adapter: str | None) -> tuple[str, dict[str, Any]]:
    """Path and body as SGLang's client writes them."""
    if backend == "sglang":
        sampling = {"temperature": 0.0, "max_new_tokens": NUM_OUT, "ignore_eos": True}
        return "/generate", {
            "text": prompt,
            "sampling_params": sampling,
            "stream": True,
            "lora_path": adapter,
            "return_logprob": False,
            "return_routed_experts": False,
            "logprob_start_len": -1,
        }
    body: dict[str, Any] = {
        "model": adapter or "parrot",
        "stream": True,
        "temperature": 0.0,
        "ignore_eos": True,
    }
    if adapter:
        body["lora_path"] = adapter
    if backend == "sglang-oai":
        return "/v1/completions", body | {"prompt": prompt, "best_of": 1, "max_tokens": NUM_OUT}
    messages = [{"role": "user", "content": prompt}]
    return "/v1/chat/completions", body | {
        "messages": messages,
        "max_completion_tokens": NUM_OUT,
    }


def text_of(event: Any) -> str:
    choice = event["choices"][0]
    return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


@pytest.mark.anyio
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
async def test_the_requests_of_sglang(url: str, backend: str, assignment: str) -> None:
    async with aiohttp.ClientSession() as session:
        models = await get(session, f"{url}/v1/models")
        assert models["data"][0]["id"] == "parrot"
        info = await get(session, f"{url}/model_info")
        # The client loads its tokenizer from there.
        assert (Path(info["tokenizer_path"]) / "tokenizer.json").is_file()

        async def ask(prompt: str, adapter: str | None) -> tuple[str | None, str]:
            path, body = sglang_request(backend, prompt, adapter)
            found = await events(session, url + path, body)
            if backend == "sglang":
                assert found[-1]["meta_info"]["completion_tokens"] == NUM_OUT
                assert found[-1]["meta_info"]["prompt_tokens"] > 0
                return adapter, found[-1]["text"]
            return adapter, "".join(text_of(event) for event in found)

        calls = list(zip(PROMPTS, ASSIGNMENTS[assignment], strict=True))
        warmup = await ask(*calls[0])
        params = {"timeout": "60.0"}
        async with session.post(f"{url}/flush_cache", params=params) as response:
            assert response.status == 200
        texts = await asyncio.gather(*(ask(*call) for call in calls))
        assert texts[0] == warmup
        assert all(text for _, text in texts)
        server = await get(session, f"{url}/server_info")
        assert isinstance(server["internal_states"][0], dict)


@pytest.mark.anyio
@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
async def test_the_requests_of_vllm(url: str, endpoint: str, logprobs: int | None) -> None:
    async with aiohttp.ClientSession() as session:
        card = (await get(session, f"{url}/v1/models"))["data"][0]
        assert (Path(card["root"]) / "tokenizer.json").is_file()
        # Its probes of what only vLLM has are answered, too: not found.
        tokens = {"model": card["root"], "prompt": PROMPTS[0], "add_special_tokens": False}
        async with session.post(f"{url}/tokenize", json=tokens) as response:
            assert response.status == 404
        async with session.get(f"{url}/metrics") as response:
            assert response.status == 404

        async def ask(prompt: str, adapter: str) -> None:
            body: dict[str, Any] = {
                "model": adapter,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "temperature": 0.0,
            }
            if endpoint == "/v1/completions":
                body |= {"prompt": prompt, "repetition_penalty": 1.0, "max_tokens": NUM_OUT}
                body["logprobs"] = logprobs
            else:
                content = [{"type": "text", "text": prompt}]
                body["messages"] = [{"role": "user", "content": content}]
                body["max_completion_tokens"] = NUM_OUT
            *chunks, last = await events(session, url + endpoint, body)
            assert not last["choices"]
            assert last["usage"]["completion_tokens"] == NUM_OUT
            assert last["usage"]["prompt_tokens"] > 0
            assert all(chunk["choices"] for chunk in chunks)
            assert "".join(text_of(chunk) for chunk in chunks)

        await ask(PROMPTS[0], "parrot")
        calls = zip(PROMPTS, ASSIGNMENTS["distinct"], strict=True)
        await asyncio.gather(*(ask(*call) for call in calls))


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *words], check=True, timeout=900)


def run_client(kind: str, root: Path, *options: str) -> None:
    words = [sys.executable, bench_client.__file__, kind, str(root), *options]
    subprocess.run(words, check=True, timeout=280)


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sglang")
    # Not its dependencies, which are an engine's; these are the client's that the tests do not have themselves.
    pip("install", "--no-deps", "--target", str(root), "sglang==0.5.23", "pybase64", "pillow")
    return root


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vllm")
    pip("download", "--no-deps", "--dest", str(root), "vllm==0.33.0")
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            root, [name for name in archive.namelist() if name.startswith("vllm/benchmarks/")]
        )
    wheel.unlink()
    return root


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
@pytest.mark.parametrize("distribution", ["uniform", "distinct", "skewed"])
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai", "sglang-oai-chat"])
def test_the_client_of_sglang(
    url: str, sglang: Path, tmp_path: Path, backend: str, distribution: str
) -> None:
    output = tmp_path / "results.jsonl"
    options = f"--backend {backend} --base-url {url} --num-prompts {NUM_PROMPTS}"
    options += " --dataset-name random-ids --random-input-len 24 --random-output-len 8"
    options += f" --lora-request-distribution {distribution} --lora-name {' '.join(ADAPTERS)}"
    options += f" --flush-cache --output-details --disable-tqdm --output-file {output}"
    if backend == "sglang":
        options += " --return-logprob --top-logprobs-num 2 --cache-report"
    run_client("sglang", sglang, *options.split())
    result = json.loads(output.read_text())
    assert result["completed"] == NUM_PROMPTS
    assert result["errors"] == [""] * NUM_PROMPTS
    assert set(result["server_info"]["adapters"]) == set(ADAPTERS)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_the_client_of_vllm(url: str, vllm: Path, tmp_path: Path, backend: str) -> None:
    endpoint = "/v1/completions" if backend == "openai" else "/v1/chat/completions"
    options = f"--backend {backend} --endpoint {endpoint} --base-url {url}"
    options += f" --num-prompts {NUM_PROMPTS} --lora-modules {' '.join(ADAPTERS)} --ignore-eos"
    options += " --temperature 0 --save-result --save-detailed --disable-tqdm"
    options += f" --result-dir {tmp_path} --result-filename results.json"
    if backend == "openai":
        options += " --logprobs 2"
    run_client("vllm", vllm, *options.split())
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["completed"] == NUM_PROMPTS
    assert result["failed"] == 0
    assert result["tokenizer_id"] == str(demo.model_path())
    assert result["output_lens"] == [NUM_OUT] * NUM_PROMPTS
