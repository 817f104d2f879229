"""A model whose authors recommend how to sample from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest

from lorikeet import LLM, demo
from lorikeet.errors import ModelError
from tests.support.served import served


def recommend(directory: Path, **fields: object) -> Path:
    """The demo's model with a ``generation_config.json`` of these fields."""
    model = directory / "model"
    shutil.copytree(demo.model_path(), model)
    (model / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": 1}))
    return model


def test_chats_of_a_model_that_is_greedy(tmp_path: Path) -> None:
    model = recommend(tmp_path, temperature=1e-6, top_k=1)
    body = {"model": "m", "messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 12}

    def texts(**fields: object) -> set[str]:
        replies = [httpx.post(f"{url}/v1/chat/completions", json=body | fields) for _ in range(6)]
        return {reply.json()["choices"][0]["message"]["content"] for reply in replies}

    with served(f"--model-path {model} --served-model-name m") as url:
        info = httpx.get(f"{url}/server_info").json()
        assert info["sampling_defaults"] == {"temperature": 1e-6, "top_k": 1}
        assert len(texts()) == 1
        assert len(texts(temperature=3, top_k=-1)) > 1


def test_a_model_that_recommends_nonsense(tmp_path: Path) -> None:
    model = recommend(tmp_path, temperature=-1)
    with pytest.raises(ModelError, match=r"generation_config\.json: temperature is -1.*openai"):
        LLM(str(model))
    with LLM(str(model), sampling_defaults="openai", max_total_tokens=256) as llm:
        assert llm.generate("Hi", {"max_new_tokens": 1})
