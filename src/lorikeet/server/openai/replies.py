"""Makes the replies of the OpenAI API, whole and in chunks.

A choice is told piece by piece: each call of ``advance`` returns what is new since the last one. A whole reply is a
choice told in one piece, so the pieces of a stream always add up to it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lorikeet.core.request import Request, TokenLogprobs
from lorikeet.server.openai.calls import Call
from lorikeet.server.openai.tool_parsers import Arguments, Begin, Broken, End, Event, Text
from lorikeet.server.openai.tools import ToolUse
from lorikeet.text.completion import Snapshot
from lorikeet.text.tokenizer import Detokenizer, Tokenizer

Reply = dict[str, Any]

# What OpenAI writes for a token that cannot come; JSON has no infinity.
MIN_LOGPROB = -9999.0


class Envelope:
    """The fields around the choices of a reply.

    Args:
        make_choice: whose kind of reply it is.
    """

    def __init__(self, call: Call, make_choice: type[Choice]) -> None:
        self._call = call
        self._made_by = make_choice
        self._created = int(time.time())

    def whole(self, choices: list[Reply], snapshots: Sequence[Snapshot]) -> Reply:
        usage = count_usage(snapshots, self._call.num_samples)
        return self._object(self._made_by.kind, choices) | {"usage": usage}

    def chunk(self, choice: Reply) -> Reply:
        reply = self._object(self._made_by.chunk_kind, [choice])
        return reply | {"usage": None} if self._call.has_usage else reply

    def usage_chunk(self, snapshots: Sequence[Snapshot]) -> Reply:
        usage = count_usage(snapshots, self._call.num_samples)
        return self._object(self._made_by.chunk_kind, []) | {"usage": usage}

    def _object(self, kind: str, choices: list[Reply]) -> Reply:
        return {
            "id": self._call.id,
            "object": kind,
            "created": self._created,
            "model": self._call.model,
            "choices": choices,
        }


class Speech:
    """One choice's message.

    A call that breaks stays one with its arguments as far as they go: a stream has told it already, and the whole message
    says what a stream says.

    Args:
        tools: what it may call; None: its content is the text.
    """

    def __init__(self, tools: ToolUse | None) -> None:
        self._tools = tools
        self._parser = None if tools is None else tools.form.parser(tools.names)
        self._num_chars = 0
        self._num_begun = 0
        self._num_complete = 0

    @property
    def has_calls(self) -> bool:
        """A call of a tool is complete."""
        return self._num_complete > 0

    def deltas(self, snapshot: Snapshot) -> list[Reply]:
        """What is new since the last call, as deltas of a stream."""
        return [delta for event in self._read(snapshot) if (delta := self._delta(event))]

    def message(self, snapshot: Snapshot) -> Reply:
        """The content and the tool calls of a completion that has finished: what its deltas add up to."""
        content: list[str] = []
        calls: list[Reply] = []
        for delta in self.deltas(snapshot):
            content.append(delta.get("content", ""))
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: item for name, item in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if not calls:
            return {"content": "".join(content)}
        return {"content": "".join(content) or None, "tool_calls": calls}

    def _read(self, snapshot: Snapshot) -> list[Event]:
        if self._parser is None:
            text = snapshot.text[self._num_chars :]
            self._num_chars = len(snapshot.text)
            return [Text(text)] if text else []
        events = self._parser.advance(snapshot.text, is_over=snapshot.finish is not None)
        self._num_complete += sum(isinstance(event, End) for event in events)
        return events

    def _delta(self, event: Event) -> Reply | None:
        match event:
            case Text(text):
                return {"content": text}
            case Begin(name):
                assert self._tools is not None
                self._num_begun += 1
                call = {"id": self._tools.form.make_id(), "type": "function"}
                return self._call(call | {"function": {"name": name, "arguments": ""}})
            case Arguments(text):
                return self._call({"function": {"arguments": text}})
            case End() | Broken():
                return None

    def _call(self, fields: Reply) -> Reply:
        return {"tool_calls": [{"index": self._num_begun - 1} | fields]}


class ChatChoice:
    """One choice of a chat completion.

    A choice is told by ``whole`` from a finished completion, or by ``chunks``, each time with what is new.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._wants_logprobs = call.batch.request_of(index).return_logprob
        self._speech = Speech(call.tools)
        self._num_tokens = 0
        self._has_begun = False

    def whole(self, snapshot: Snapshot) -> Reply:
        message = {"role": "assistant", "refusal": None} | self._speech.message(snapshot)
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs(snapshot),
            "finish_reason": self._finish_reason(snapshot),
        }

    def chunks(self, snapshot: Snapshot) -> list[Reply]:
        """The choices of the next chunks. The first of all has the role, the last one the finish reason and no content."""
        chunks: list[Reply] = []
        if not self._has_begun:
            self._has_begun = True
            chunks.append(self._chunk({"role": "assistant", "content": ""}))
        deltas, logprobs = self._speech.deltas(snapshot), self._logprobs(snapshot)
        if not deltas and logprobs and logprobs["content"]:
            deltas = [{"content": ""}]
        for delta in deltas:
            chunks.append(self._chunk(delta, logprobs=logprobs))
            logprobs = None
        if snapshot.finish is not None:
            chunks.append(self._chunk({}, finish=self._finish_reason(snapshot)))
        return chunks

    def _finish_reason(self, snapshot: Snapshot) -> str:
        reason = finish_reason(snapshot)
        return "tool_calls" if reason == "stop" and self._speech.has_calls else reason

    def _chunk(
        self, delta: Reply, *, logprobs: Reply | None = None, finish: str | None = None
    ) -> Reply:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish,
        }

    def _logprobs(self, snapshot: Snapshot) -> Reply | None:
        """Log-probabilities of the tokens that are new, also of those whose text is no content."""
        if not self._wants_logprobs:
            return None
        new = snapshot.output_logprobs[self._num_tokens :]
        self._num_tokens += len(new)
        return {"content": [self._position(item) for item in new], "refusal": None}

    def _position(self, item: TokenLogprobs) -> Reply:
        top = [self._token(token_id, logprob) for logprob, token_id in item.top]
        return self._token(item.token_id, item.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float | None) -> Reply:
        return {
            "token": token_name(self._tokenizer, token_id),
            "logprob": bounded(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }


class CompletionChoice:
    """One choice of a completion. With ``echo`` its text and its log-probabilities begin with the prompt's."""

    kind = chunk_kind = "text_completion"

    def __init__(self, index: int, call: Call, tokenizer: Tokenizer) -> None:
        request = call.batch.request_of(index)
        self._index = index
        self._prompt = call.echo[index // call.num_samples] if call.echo else ""
        self._num_chars = 0
        self._logprobs: _OffsetLogprobs | None = None
        if request.return_logprob:
            self._logprobs = _OffsetLogprobs(tokenizer, request, self._prompt)

    def whole(self, snapshot: Snapshot) -> Reply:
        return self._piece(snapshot)[0]

    def chunks(self, snapshot: Snapshot) -> list[Reply]:
        piece, is_empty = self._piece(snapshot)
        return [] if is_empty else [piece]

    def _piece(self, snapshot: Snapshot) -> tuple[Reply, bool]:
        """What is new, and whether that is nothing."""
        text = self._prompt + snapshot.text
        new_text = text[self._num_chars :]
        self._num_chars = len(text)
        logprobs = None if self._logprobs is None else self._logprobs.advance(snapshot)
        has_tokens = logprobs is not None and logprobs["tokens"]
        piece = {
            "index": self._index,
            "text": new_text,
            "logprobs": logprobs,
            "finish_reason": None if snapshot.finish is None else finish_reason(snapshot),
        }
        return piece, not new_text and not has_tokens and snapshot.finish is None


Choice = ChatChoice | CompletionChoice


class _OffsetLogprobs:
    """Log-probabilities with the offset, in characters of the choice's text, at which each token begins.

    A token that begins within a character has the offset of that character.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, echo: str) -> None:
        skip = request.sampling.skip_special_tokens
        visible = tokenizer.visible_tokens(request.prompt_token_ids, skip_special_tokens=skip)
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=skip,
            spaces_between_special_tokens=request.sampling.spaces_between_special_tokens,
            continues=not echo and next(iter(visible), None) is not None,
        )
        self._echo_length = len(echo)
        self._offset = 0
        self._num_told = 0

    def advance(self, snapshot: Snapshot) -> Reply:
        num_prompt, told = len(snapshot.prompt_logprobs), self._num_told
        items = [
            *snapshot.prompt_logprobs[told:],
            *snapshot.output_logprobs[max(0, told - num_prompt) :],
        ]
        reply: Reply = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for item in items:
            if self._num_told == num_prompt:
                self._offset = self._echo_length
            self._num_told += 1
            reply["tokens"].append(token_name(self._tokenizer, item.token_id))
            reply["token_logprobs"].append(bounded(item.logprob))
            reply["top_logprobs"].append(self._top(item))
            reply["text_offset"].append(self._offset)
            self._offset += len(self._detokenizer.push(item.token_id))
        return reply

    def _top(self, item: TokenLogprobs) -> dict[str, float] | None:
        """The most likely tokens and the chosen one; None where nothing was predicted (the prompt's first)."""
        if item.logprob is None:
            return None
        top: dict[str, float] = {}
        for logprob, token_id in (*item.top, (item.logprob, item.token_id)):
            # Two tokens may have the same text; the likelier one keeps it.
            top.setdefault(token_name(self._tokenizer, token_id), max(logprob, MIN_LOGPROB))
        return top


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """Text of a token; where it is part of a character, its bytes as ``bytes:\\xe2\\x82``."""
    text = tokenizer.token_text(token_id)
    if "\ufffd" not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(token_id))


def bounded(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)


def finish_reason(snapshot: Snapshot) -> str:
    """``stop`` or ``length`` of a completion that has finished as it should."""
    if snapshot.finish is None or snapshot.finish.kind == "abort":
        raise AssertionError("the completion has not finished, or failed")
    return snapshot.finish.kind


def count_usage(snapshots: Sequence[Snapshot], num_samples: int) -> Reply:
    """Tokens of a call: each prompt counts once, however many completions it has."""
    prompts = snapshots[::num_samples]
    num_prompt = sum(item.prompt_tokens for item in prompts)
    num_completion = sum(item.completion_tokens for item in snapshots)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": sum(item.cached_tokens for item in prompts)},
    }
