"""The reply object of the native API, key by key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorikeet.client.reply import finish_object, native_reply
from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason, Request, SamplingParams, TokenLogprobs
from lorikeet.text.completion import Snapshot


def snapshot(*, finish: FinishReason | None = None, **request: Any) -> Snapshot:
    return Snapshot(
        rid="r1",
        request=Request(
            prompt_token_ids=[5, 6], sampling=SamplingParams(), adapter="sql", **request
        ),
        text="hi",
        output_ids=[7, 8],
        finish=finish,
        prompt_tokens=2,
        cached_tokens=1,
        output_logprobs=[
            TokenLogprobs(-0.5, 7, [(-0.25, 9), (-0.5, 7)]),
            TokenLogprobs(-1.0, 8, [(-1.0, 8)]),
        ],
        prompt_logprobs=[TokenLogprobs(None, 5, []), TokenLogprobs(-2.0, 6, [(-2.0, 6)])],
        e2e_latency=0.75,
        first_token_latency=0.5,
    )


def test_the_whole_object() -> None:
    reply = native_reply(snapshot(finish=FinishReason(kind="stop", matched=8)))
    assert reply == {
        "text": "hi",
        "output_ids": [7, 8],
        "meta_info": {
            "id": "r1",
            "finish_reason": {"type": "stop", "matched": 8},
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "cached_tokens": 1,
            "e2e_latency": 0.75,
            "lora_name": "sql",
        },
    }
    assert json.loads(json.dumps(reply)) == reply


def test_a_running_completion_has_no_reason_and_may_have_an_index() -> None:
    reply = native_reply(snapshot(), index=3)
    assert reply["meta_info"]["finish_reason"] is None
    assert reply["index"] == 3


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (FinishReason(kind="stop", matched="\n"), {"type": "stop", "matched": "\n"}),
        (FinishReason(kind="stop"), {"type": "stop", "matched": None}),
        (FinishReason(kind="length", length=4), {"type": "length", "length": 4}),
        (
            FinishReason(kind="abort", failure=Failure("unavailable", "no")),
            {"type": "abort", "message": "no", "status_code": 503},
        ),
    ],
)
def test_finish_reasons(finish: FinishReason, expected: dict[str, Any]) -> None:
    assert finish_object(finish) == expected


def test_logprobs_only_when_asked_for() -> None:
    meta = native_reply(snapshot(return_logprob=True))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 5, None], [-2.0, 6, None]]
    assert meta["output_token_logprobs"] == [[-0.5, 7, None], [-1.0, 8, None]]
    assert "input_top_logprobs" not in meta
    assert "output_top_logprobs" not in meta


def test_top_logprobs_and_texts() -> None:
    request = snapshot(return_logprob=True, top_logprobs_num=2)
    meta = native_reply(request, token_text="<{}>".format)["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 5, "<5>"], [-2.0, 6, "<6>"]]
    assert meta["input_top_logprobs"] == [None, [[-2.0, 6, "<6>"]]]
    assert meta["output_top_logprobs"] == [
        [[-0.25, 9, "<9>"], [-0.5, 7, "<7>"]],
        [[-1.0, 8, "<8>"]],
    ]
