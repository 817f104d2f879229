"""One completion as it grows: outputs of the engine go in, text and everything else that a reply shows comes out.

The engine knows tokens; stop strings are found here, in the text. Three rules say what a completion consists of:

- It ends with the token that completed a stop string or pattern. Tokens that the engine produced before it heard of
  that are dropped, with their log-probabilities.
- A stop string or pattern is cut from the text, and so is the text of an end-of-sequence or stop token, unless
  ``no_stop_trim``; then the text ends with it. The token itself stays in ``output_ids``.
- While the completion runs, the tail of the text that may be the beginning of a stop is held back, so the text of one
  snapshot is always the beginning of the next one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import msgspec

from lorikeet.core.failure import Failure
from lorikeet.core.request import FinishReason, Request, RequestOutput, TokenLogprobs
from lorikeet.text.stop import StopBudgetError, StopMatch, StopMatcher, StopRules
from lorikeet.text.tokenizer import Detokenizer, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A completion at one moment; everything is cumulative.

    Attributes:
        rid: what the caller calls it.
        text: the completion's text, without what is held back while it may begin a stop.
        output_ids: the tokens, the one that ended the completion included.
        finish: None while it runs.
        output_logprobs: one per output token if asked for.
        prompt_logprobs: from ``logprob_start_len`` to the end of the prompt if asked for.
        e2e_latency: seconds since the completion was made, until now or until it ended.
        first_token_latency: seconds until the first output token; None before it.
    """

    rid: str
    request: Request
    text: str
    output_ids: list[int]
    finish: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    output_logprobs: Sequence[TokenLogprobs]
    prompt_logprobs: Sequence[TokenLogprobs]
    e2e_latency: float
    first_token_latency: float | None

    @property
    def completion_tokens(self) -> int:
        return len(self.output_ids)

    @property
    def num_logprobs(self) -> int:
        """Log-probabilities that it has, of the prompt and of the output."""
        num_positions = len(self.prompt_logprobs) + len(self.output_logprobs)
        return num_positions * (1 + self.request.top_logprobs_num)


class Completion:
    """Accumulates the outputs of one completion.

    Args:
        request: as submitted to the engine, shared with its other completions.
        tokenizer: the model's.
        stops: what ends it besides the engine, shared with the others of its call; None are those of the request alone.
        rid: what the caller calls this one.
        markers: special tokens that are part of the text although ``skip_special_tokens`` is set.
        clock: seconds, monotonic.

    Attributes:
        rid: what the caller calls it.
        embedding: the vector, once it has finished, of a request with ``pooling``.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        *,
        stops: StopRules | None = None,
        rid: str = "",
        markers: Collection[int] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.rid = rid
        self._sampling = sampling
        visible = tokenizer.visible_tokens(
            request.prompt_token_ids, skip_special_tokens=sampling.skip_special_tokens
        )
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=sampling.skip_special_tokens,
            spaces_between_special_tokens=sampling.spaces_between_special_tokens,
            continues=next(iter(visible), None) is not None,
            except_for=markers,
        )
        self._stops = StopMatcher(stops or StopRules(sampling.stop, sampling.stop_regex))
        self._text = _GrowingText()
        self._output_ids: list[int] = []
        self._output_logprobs = PackedLogprobs()
        self._prompt_logprobs = PackedLogprobs()
        self._cached_tokens = 0
        self._finish: FinishReason | None = None
        self.embedding: bytes | None = None
        self._clock = clock
        self._began = clock()
        self._first_token: float | None = None
        self._ended: float | None = None

    @property
    def finish(self) -> FinishReason | None:
        """None while it runs."""
        return self._finish

    @property
    def text(self) -> str:
        """The cumulative text that may be shown now."""
        return self._text.shown

    def add(self, output: RequestOutput) -> bool:
        """Take what the engine says about this request; nothing happens once the completion has ended.

        Returns:
            True if the completion has just ended while the engine goes on: the caller must abort the request there.
        """
        if self._finish is not None:
            return False
        if output.prompt_logprobs:
            self._prompt_logprobs = PackedLogprobs(output.prompt_logprobs)
        self.embedding = output.embedding
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
        if output.token_ids and self._first_token is None:
            self._first_token = self._clock()
        try:
            finish = self._take_tokens(output)
            if finish is None and output.finish is not None:
                finish = self._take_finish(output.finish)
        except StopBudgetError as error:
            finish = FinishReason(kind="abort", failure=Failure("refused", str(error)))
        self._text.show(
            all_but=0 if finish or self._sampling.no_stop_trim else self._stops.num_held
        )
        if finish is None:
            return False
        self._finish = finish
        self._ended = self._clock()
        return output.finish is None

    def fail(self, message: str) -> None:
        """End it with an error on our side, unless it has ended."""
        if self._finish is None:
            self._finish = FinishReason(kind="abort", failure=Failure("failed", message))
            self._ended = self._clock()

    def snapshot(self) -> Snapshot:
        """Everything so far, as values of its own."""
        now = self._clock() if self._ended is None else self._ended
        first = self._first_token
        return Snapshot(
            rid=self.rid,
            request=self.request,
            text=self._text.shown,
            output_ids=list(self._output_ids),
            finish=self._finish,
            prompt_tokens=len(self.request.prompt_token_ids),
            cached_tokens=self._cached_tokens,
            output_logprobs=self._output_logprobs.so_far(),
            prompt_logprobs=self._prompt_logprobs,
            e2e_latency=now - self._began,
            first_token_latency=None if first is None else first - self._began,
        )

    @property
    def _counts(self) -> bool:
        return len(self._output_ids) >= self._sampling.min_new_tokens

    def _take_tokens(self, output: RequestOutput) -> FinishReason | None:
        """Append the new tokens up to the one that completes a stop, if one does."""
        hidden = self._hidden_token(output.finish)
        last = len(output.token_ids) - 1
        for index, token_id in enumerate(output.token_ids):
            self._output_ids.append(token_id)
            self._output_logprobs.extend(output.logprobs[index : index + 1])
            if index == last and token_id == hidden:
                return None
            match = self._take_text(self._detokenizer.push(token_id))
            if match:
                return FinishReason(kind="stop", matched=match.matched)
        return None

    def _hidden_token(self, finish: FinishReason | None) -> int | None:
        """The stop token whose text is not part of the completion."""
        if finish is None or finish.kind != "stop" or self._sampling.no_stop_trim:
            return None
        return finish.matched if isinstance(finish.matched, int) else None

    def _take_text(self, delta: str) -> StopMatch | None:
        self._text.append(delta)
        match = self._stops.push(delta, counts=self._counts)
        if match is None:
            # A run of byte tokens may hold a complete stop although its text is not final.
            tentative = self._detokenizer.peek()
            match = self._stops.peek(tentative, counts=self._counts)
            if match:
                self._text.append(tentative)
        if match:
            self._cut(match)
        return match

    def _take_finish(self, finish: FinishReason) -> FinishReason:
        """The engine has ended the request: release what was held back, unless a stop is found in it."""
        rest = self._detokenizer.flush()
        self._text.append(rest)
        match = self._stops.push(rest, counts=self._counts)
        if match is None:
            return finish
        self._cut(match)
        return FinishReason(kind="stop", matched=match.matched)

    def _cut(self, match: StopMatch) -> None:
        self._text.cut(match.end if self._sampling.no_stop_trim else match.start)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(TokenLogprobs).decode


class PackedLogprobs(Sequence[TokenLogprobs]):
    """Log-probabilities of positions, oldest first, in a tenth of the memory that objects take. A position is unpacked
    whenever it is asked for."""

    __slots__ = ("_items", "_length")

    def __init__(self, positions: Iterable[TokenLogprobs] = ()) -> None:
        self._items = [_encode(position) for position in positions]
        self._length = len(self._items)

    def extend(self, positions: Iterable[TokenLogprobs]) -> None:
        """Add positions at the end."""
        self._items.extend(map(_encode, positions))
        self._length = len(self._items)

    def so_far(self) -> PackedLogprobs:
        """A view of what is there now, which does not grow; costs nothing."""
        view = PackedLogprobs()
        view._items, view._length = self._items, self._length
        return view

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...

    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...

    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        places = range(self._length)[index]
        if isinstance(places, int):
            return _decode(self._items[places])
        return [_decode(self._items[place]) for place in places]


class _GrowingText:
    """A text that grows at its end, and how much of it has been shown."""

    def __init__(self) -> None:
        self._joined = ""
        self._new: list[str] = []
        self._length = 0
        self._num_shown = 0

    def append(self, delta: str) -> None:
        if delta:
            self._new.append(delta)
            self._length += len(delta)

    def cut(self, end: int) -> None:
        """Drop everything from ``end`` on; what has been shown stays."""
        self._length = max(end, self._num_shown)
        self._joined = self._join()[: self._length]

    def show(self, *, all_but: int) -> None:
        """Show the text without its last ``all_but`` characters; what has been shown stays."""
        self._num_shown = max(self._num_shown, self._length - all_but)

    @property
    def shown(self) -> str:
        return self._join()[: self._num_shown]

    def _join(self) -> str:
        if self._new:
            self._joined = "".join((self._joined, *self._new))
            self._new.clear()
        return self._joined
