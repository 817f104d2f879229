"""What the HTTP process and the engine process say to each other: one tagged union in each direction.

Every message is msgpack. Every message can be sent, whatever strangers have put into it, and what arrives and cannot be
read is an :class:`Unreadable` that says for whom it was: one odd value never ends a process. Adding a message means
adding a class here and a case to the ``match`` at the receiving end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import msgspec

from lorikeet.core.commands import AnyCommand, Result
from lorikeet.core.failure import Failure
from lorikeet.core.request import Prompt, Request, RequestOutput, SamplingParams
from lorikeet.core.views import AdapterUse, AdapterView, EngineInfo


class SubmittedPrompt(Prompt, kw_only=True):
    """A request inside a :class:`Submit`; ``sampling`` is an index into the message's list of parameters."""

    sampling: int


class Submit(msgspec.Struct, tag=True):
    """Start the requests of one call, so that they can share their first step.

    Each completion is answered by ``Accepted`` or by ``Outputs`` with a terminal output.

    Attributes:
        first_id: completions are numbered from here on, request after request. No number is ever used again.
        num_completions: how many there are, also where the rest cannot be read.
        sampling: the parameters, each set once, however many requests share it.
    """

    first_id: int
    num_completions: int
    sampling: list[SamplingParams]
    entries: list[SubmittedPrompt]

    @classmethod
    def of(cls, first_id: int, requests: Sequence[Request]) -> Submit:
        """Build the message for these requests. Parameters that are one object are sent once."""
        places: dict[int, int] = {}
        sampling: list[SamplingParams] = []
        entries: list[SubmittedPrompt] = []
        for request in requests:
            place = places.setdefault(id(request.sampling), len(sampling))
            if place == len(sampling):
                sampling.append(request.sampling)
            fields = {name: getattr(request, name) for name in Prompt.__struct_fields__}
            entries.append(SubmittedPrompt(sampling=place, **fields))
        num = sum(request.num_samples for request in requests)
        return cls(first_id, num, sampling, entries)

    @property
    def ids(self) -> range:
        """The completions' numbers."""
        return range(self.first_id, self.first_id + self.num_completions)

    def requests(self) -> list[Request]:
        """The requests, which share their parameters again."""
        return [Request.of(entry, self.sampling[entry.sampling]) for entry in self.entries]


class Abort(msgspec.Struct, tag=True):
    """End completions early. ``ids=None`` means all. Each is answered by its terminal output, if still open."""

    ids: list[int] | None
    message: str = "aborted by the client"


class Ask(msgspec.Struct, tag=True):
    """Ask the engine for something other than tokens; answered by ``Reply`` with the same id."""

    id: int
    command: AnyCommand


class Cancel(msgspec.Struct, tag=True):
    """Nobody waits for the answer to the command ``id`` any more: what can still be undone is undone."""

    id: int


class Shutdown(msgspec.Struct, tag=True):
    """End the engine: no new requests; running ones get ``drain_seconds`` to finish, then are aborted."""

    drain_seconds: float = 0.0


class Accepted(msgspec.Struct, tag=True):
    """These completions were checked against the adapters and their grammar compiled; outputs will follow."""

    ids: list[int]


class Outputs(msgspec.Struct, tag=True):
    """What one step produced, for all completions it touched."""

    outputs: list[RequestOutput]


class Reply(msgspec.Struct, tag=True):
    """Answer to an ``Ask``: the result or, if it failed, why."""

    id: int
    result: Result = None
    failure: Failure | None = None


class AdapterTemplates(msgspec.Struct, tag=True):
    """The chat templates of adapters that were loaded, and None for adapters that were unloaded.

    It is sent before whatever follows from it: the reply to a load, or Ready for the adapters of the start.

    Attributes:
        changed: name -> its templates by their names (none: the base's are used).
    """

    changed: dict[str, dict[str, str] | None]

    def apply(self, known: dict[str, dict[str, str]]) -> None:
        """Make the changes in a table of the names that are loaded."""
        for name, templates in self.changed.items():
            known.pop(name, None)
            if templates is not None:
                known[name] = templates


class AdaptersChanged(msgspec.Struct, tag=True):
    """What has changed about the adapters. It is sent before whatever follows from it, like ``AdapterTemplates``.

    Attributes:
        names: name -> everything that it means now; empty if it means nothing any more.
        uses: version -> how it is used now; None if it is gone.
        reports: version -> what it changes in the base model, as JSON, for versions of ``names``.
    """

    names: dict[str, list[AdapterView]] = {}
    uses: dict[int, AdapterUse | None] = {}
    reports: dict[int, bytes] = {}


class Progress(msgspec.Struct, tag=True):
    """The engine's state of start-up, shown by the parent (``phase`` is free text for a log)."""

    phase: str


class Ready(msgspec.Struct, tag=True):
    """The engine serves."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """The engine could not start (its flags or files are to blame if the failure says ``refused``) or has died."""

    failure: Failure


class Stats(msgspec.Struct, tag=True):
    """Counters and gauges of the engine, sent at most once a second.

    Attributes:
        values: name -> value.
        labels: name -> names of adapters (``running_lora_adapters``, ``waiting_lora_adapters``).
        samples: name -> what was measured since the last of these messages, in seconds.
    """

    values: dict[str, float]
    labels: dict[str, list[str]] = {}
    samples: dict[str, list[float]] = {}


class Pulse(msgspec.Struct, tag=True):
    """The engine's process lives: sent once a second by a thread of its own, however long a step takes."""


class Unreadable(msgspec.Struct):
    """A message that has arrived and cannot be read; never sent.

    Attributes:
        reason: what is wrong with it.
        ids: the completions that it was about, as far as it tells.
        command: the command that it was, or that it answers.
    """

    reason: str
    ids: list[int]
    command: int | None


ToEngine = Submit | Abort | Ask | Cancel | Shutdown
ToClient = (
    Accepted
    | Outputs
    | Reply
    | AdapterTemplates
    | AdaptersChanged
    | Progress
    | Ready
    | Failed
    | Stats
    | Pulse
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_client = msgspec.msgpack.Decoder(ToClient)

# What msgpack can hold.
_LEAST_INT, _MOST_INT = -(2**63), 2**64 - 1
# Deeper values are cut off: the encoder and the decoder follow nesting with the stack.
_MAX_DEPTH = 200


def encode(message: ToEngine | ToClient) -> bytes:
    """Serialise a message of either direction, whatever values it holds.

    Values of strangers reach messages (a schema's keys, a template's name, an error that quotes them), so nothing may
    be without a form: see :func:`encodable`.
    """
    try:
        return _encoder.encode(message)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return _encoder.encode(encodable(message))


def encodable(value: object, depth: int = 0) -> object:
    """A value that msgpack can hold in place of one that it may not.

    Half a surrogate pair becomes U+FFFD (a whole one its character), an integer beyond 64 bits its digits as text (or
    a word about its size), what is nested too deeply an ellipsis, and an object of any other kind its type's name.
    """
    match value:
        case None | bool() | float() | bytes() | bytearray():
            return value
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case int():
            return value if _LEAST_INT <= value <= _MOST_INT else _words(value)
        case _ if depth == _MAX_DEPTH:
            return "…"
        case msgspec.Struct():
            return _fields(value, depth)
        case dict():
            items = cast("dict[object, object]", value).items()
            return {_key(key): encodable(item, depth + 1) for key, item in items}
        case list() | tuple() | set() | frozenset():
            items = cast("Collection[object]", value)
            return [encodable(item, depth + 1) for item in items]
        case _:
            return f"<{type(value).__name__}>"


def _fields(value: msgspec.Struct, depth: int) -> object:
    config = value.__struct_config__
    values = [encodable(getattr(value, name), depth + 1) for name in value.__struct_fields__]
    if config.array_like:
        return values
    fields = dict(zip(value.__struct_encode_fields__, values, strict=True))
    return fields if config.tag is None else {config.tag_field: config.tag, **fields}


def _key(key: object) -> object:
    """A dictionary's key cannot become a list, which another one could not be looked up by."""
    is_plain = key is None or isinstance(key, str | bytes | int | float)
    return encodable(key) if is_plain else f"<{type(key).__name__}>"


def _words(number: int) -> str:
    try:
        return str(number)
    except ValueError:  # more digits than the interpreter converts
        return f"<an integer of {number.bit_length()} bits>"


def decode_to_engine(data: bytes) -> ToEngine | Unreadable:
    """Parse what a client sent."""
    try:
        return _to_engine.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        return _unreadable(data, error)


def decode_to_client(data: bytes) -> ToClient | Unreadable:
    """Parse what the engine sent."""
    try:
        return _to_client.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        return _unreadable(data, error)


def _unreadable(data: bytes, error: Exception) -> Unreadable:
    """For whom it was: the encoder does not check the types of fields, so a message may be of the right kind and wrong."""
    try:
        parts: object = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, RecursionError):
        parts = None
    found = Unreadable(f"{type(error).__name__}: {error}", [], None)
    if not isinstance(parts, dict):
        return found
    fields = cast("dict[object, object]", parts)
    number, first, count = (fields.get(name) for name in ("id", "first_id", "num_completions"))
    if isinstance(first, int) and isinstance(count, int):
        found.ids = list(range(first, first + count))
        return found
    found.command = number if isinstance(number, int) else None
    outputs = fields.get("outputs")
    for output in cast("list[object]", outputs) if isinstance(outputs, list) else []:
        item = cast("dict[object, object]", output).get("id") if isinstance(output, dict) else None
        if isinstance(item, int):
            found.ids.append(item)
    return found
