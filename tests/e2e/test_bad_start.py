"""A server that cannot start says what is wrong in one line, before any work, and exits with 2."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lorikeet.utils import free_port
from tests.e2e.conftest import World
from tests.support.peft_adapters import edit_config, make_adapter
from tests.support.tiny_models import make_tiny_model


def start(*args: object) -> subprocess.CompletedProcess[str]:
    """Run the server's command to its end, on a port that is free unless another is given."""
    words = [str(arg) for arg in args]
    if "--port" not in words:
        words += ["--port", str(free_port())]
    command = [sys.executable, "-m", "lorikeet.launch_server", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def check(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_a_port_in_use(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = start("--model-path", world.model, "--port", port)
    check(result, str(port), "in use")
    assert "Loading" not in result.stderr  # found out before the model is read


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--lora-paths", "a=x", "a=y"], ["a"]),
        (["--enable-lora"], ["--max-lora-rank", "--lora-target-modules"]),
        (["--max-loras-per-batch", "0"], ["max-loras-per-batch"]),
        (["--lora-paths", '{lora_name:"a",lora_path:"p"}'], ["'{"]),
        (["--served-model-name", "a:b"], [":"]),
        (["--nonsense", "1"], ["--nonsense"]),
        (["--tp-size", "2"], ["tp-size"]),
        (["--device", "cuda"], ["cpu"]),
        (["--context-length", "100000"], ["100000", "512"]),
    ],
    ids=str,
)
def test_bad_flags(world: World, args: list[str], words: list[str]) -> None:
    check(start("--model-path", world.model, *args), *words)


def broken_model(tmp_path: Path, what: str) -> Path:
    model = make_tiny_model(tmp_path, "llama")
    weights = model / "model.safetensors"
    if what == "config.json":
        (model / what).unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "architecture":
        config = json.loads((model / "config.json").read_text())
        config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        (model / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("config.json", ["config.json"]),
        ("no weights", ["safetensors"]),
        ("truncated", ["model.safetensors"]),
        ("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
    ],
)
def test_bad_models(tmp_path: Path, what: str, words: list[str]) -> None:
    check(start("--model-path", broken_model(tmp_path, what)), *words)


def test_a_model_path_that_does_not_exist(tmp_path: Path) -> None:
    check(start("--model-path", tmp_path / "nothing"), "nothing")


@pytest.mark.parametrize("what", ["missing", "truncated", "dora", "other base"])
def test_one_bad_adapter_stops_the_start_and_is_named(
    world: World, tmp_path: Path, what: str
) -> None:
    bad = tmp_path / "bad"
    words = ["bad"]
    if what == "other base":
        other = make_tiny_model(tmp_path, "llama", hidden_size=32)
        make_adapter(other, bad)
        words += ["[8, 32]", "[8, 64]"]
    elif what != "missing":
        shutil.copytree(world.adapters["qv"], bad)
    if what == "truncated":
        file = bad / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        words.append("adapter_model.safetensors")
    if what == "dora":
        edit_config(bad, use_dora=True)
        words.append("use_dora")
    result = start(
        "--model-path", world.model, "--lora-paths", f"good={world.adapters['qv']}", f"bad={bad}"
    )
    check(result, *words)
