"""The reply object of the native API, for the HTTP server and for :class:`lorikeet.LLM`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from lorikeet.core.request import FinishReason, TokenLogprobs
from lorikeet.text.completion import Snapshot

TokenText = Callable[[int], str]


def native_reply(
    snapshot: Snapshot,
    *,
    token_text: TokenText | None = None,
    index: int | None = None,
    tells_prompt: bool = True,
) -> dict[str, Any]:
    """The object that ``POST /generate`` replies with, whole or so far.

    Args:
        tells_prompt: False leaves out the log-probabilities of the prompt, which a stream tells once.
        token_text: token id -> text, for ``return_text_in_logprobs``; None leaves null in that place.
        index: place of the completion in the reply's list, for streams of a batch.
    """
    request = snapshot.request
    meta: dict[str, Any] = {
        "id": snapshot.rid,
        "finish_reason": None if snapshot.finish is None else finish_object(snapshot.finish),
        "prompt_tokens": snapshot.prompt_tokens,
        "completion_tokens": snapshot.completion_tokens,
        "cached_tokens": snapshot.cached_tokens,
        "e2e_latency": snapshot.e2e_latency,
        "lora_name": request.adapter,
    }
    if request.return_logprob:
        of_prompt = snapshot.prompt_logprobs if tells_prompt else []
        meta["input_token_logprobs"] = _tokens(of_prompt, token_text)
        meta["output_token_logprobs"] = _tokens(snapshot.output_logprobs, token_text)
        if request.top_logprobs_num:
            meta["input_top_logprobs"] = _tops(of_prompt, token_text)
            meta["output_top_logprobs"] = _tops(snapshot.output_logprobs, token_text)
    reply: dict[str, Any] = {
        "text": snapshot.text,
        "output_ids": snapshot.output_ids,
        "meta_info": meta,
    }
    if index is not None:
        reply["index"] = index
    return reply


def finish_object(finish: FinishReason) -> dict[str, Any]:
    """``finish_reason`` of the native API."""
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": finish.length}
    return {"type": "abort", "message": finish.message, "status_code": finish.status_code}


def _position(logprob: float | None, token_id: int, token_text: TokenText | None) -> list[Any]:
    """``[logprob, token_id, text or None]``."""
    return [logprob, token_id, None if token_text is None else token_text(token_id)]


def _tokens(positions: Sequence[TokenLogprobs], token_text: TokenText | None) -> list[list[Any]]:
    return [_position(item.logprob, item.token_id, token_text) for item in positions]


def _tops(
    positions: Sequence[TokenLogprobs], token_text: TokenText | None
) -> list[list[list[Any]] | None]:
    """The most likely tokens of each position; None where nothing was predicted (the prompt's first)."""
    return [
        [_position(logprob, token_id, token_text) for logprob, token_id in item.top] or None
        for item in positions
    ]


def vector_floats(embedding: bytes) -> list[float]:
    """The numbers of ``RequestOutput.embedding``."""
    return list(struct.unpack(f"<{len(embedding) // 4}f", embedding))
