"""The server against its own description: whatever fits the document or just does not, no 500, no hang, no surprise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from lorikeet.server.adapters import ADMIN_PATHS
from lorikeet.server.document import REPLIES
from tests.support.served import served

# Ten tokens a second would do: what waits longer hangs.
SECONDS = 30
CHECKS = [
    schemathesis.checks.not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]


POSTS = [
    "/generate",
    "/abort_request",
    "/flush_cache",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    *ADMIN_PATHS,
]
OPERATIONS = [(path, "post" if path in POSTS else "get") for path in REPLIES]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    # A short context bounds what a request can ask for.
    with served(
        "--model-path demo --served-model-name parrot --lora-paths demo --context-length 64"
        " --enable-metrics"
    ) as url:
        yield url


@pytest.fixture(scope="module")
def document(url: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_the_document_says_what_every_path_replies(document: BaseSchema) -> None:
    assert set(document.raw_schema["paths"]) == set(REPLIES)
    for path, method in OPERATIONS:
        responses = document.raw_schema["paths"][path][method]["responses"]
        assert "422" not in responses
        assert {"200", "500", "503"} <= set(responses)


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=str)
def test_every_operation(
    document: BaseSchema, url: str, path: str, method: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("nothing can be wrong about it")

    @examples(20)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=SECONDS)

    ask()
    assert requests.get(f"{url}/health", timeout=SECONDS).status_code == 200


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        ("/generate", {"text": ["a", "b"], "lora_path": ["sql", None]}),
        ("/v1/completions", {"model": "parrot:json", "prompt": "a"}),
        (
            "/v1/chat/completions",
            {"model": "parrot", "messages": [{"role": "user", "content": "a"}]},
        ),
        ("/generate", {"text": "a", "stream": True}),
        ("/v1/completions", {"model": "parrot:json", "prompt": "a", "stream": True}),
    ],
    ids=str,
)
def test_calls_that_may_succeed(document: BaseSchema, path: str, needed: dict[str, Any]) -> None:
    """What is needed is right, and a few other fields are made up: nearly half of these are answered."""
    statuses = Counter[int]()

    @examples(30)
    @given(case=document[path]["post"].as_strategy(), data=st.data())
    def ask(case: schemathesis.Case, data: st.DataObject) -> None:
        assert isinstance(case.body, dict)
        others = sorted(case.body.keys() - needed.keys() - {"input_ids"})
        kept = data.draw(st.sets(st.sampled_from(others), max_size=2)) if others else set()
        case.body = {name: case.body[name] for name in sorted(kept)} | needed
        response = case.call_and_validate(checks=CHECKS, timeout=SECONDS)
        statuses[response.status_code] += 1

    ask()
    assert set(statuses) <= {200, 400}
    assert statuses[200] >= 8
