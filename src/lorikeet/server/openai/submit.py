"""From a call of the OpenAI API to the engine: refusals before anything starts, and what a terminal output stands for."""

from __future__ import annotations

from lorikeet.client.client import EngineClient
from lorikeet.client.stream import CompletionStream
from lorikeet.core.request import FinishReason
from lorikeet.errors import LorikeetError, RequestError
from lorikeet.server.errors import ModelNotFoundError
from lorikeet.server.openai.calls import ModelCall


async def submit(client: EngineClient, call: ModelCall) -> CompletionStream:
    """Start the requests of a call, all of them or none. The caller closes the stream.

    Raises:
        ModelNotFoundError: ``model`` names an adapter that is not there.
        RequestError: the engine refused a request, in the client's own words.
        EngineFault: the engine failed, or has no room.
    """
    markers = client.tokenizer.ids_of(call.markers)
    try:
        return await client.submit(call.batch, markers=markers)
    except RequestError as error:
        # The engine says why, not which field: it may be the adapter, or a grammar.
        if call.adapter is None or client.adapters.path(call.adapter) is not None:
            raise call.in_own_words(error) from error
        if not call.named_by_model:
            raise RequestError(f"lora_path: {error}", "lora_path") from error
        raise ModelNotFoundError(
            f"the model {call.model!r} does not exist: {error}", "model"
        ) from error


def check_finish(finish: FinishReason) -> None:
    """Raise what a terminal output stands for; a completion that was cut off is none."""
    error: LorikeetError | None = finish.error()
    if error is None and finish.kind == "abort":
        error = RequestError(f"the request was aborted: {finish.message or 'no reason given'}")
    if error is not None:
        raise error
