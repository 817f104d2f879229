"""What the HTTP process and the engine process say to each other: one tagged union in each direction.

Every message is msgpack; ``decode_to_engine`` and ``decode_to_client`` refuse anything else. Adding a message means
adding a class here and a row to the table of handlers at the receiving end.
"""

from __future__ import annotations

import msgspec

from lorikeet.core.request import Request, RequestOutput


class Submit(msgspec.Struct, tag=True):
    """Start the requests of one call, so that they can share their first step.

    Each is answered by ``Accepted`` or by ``Outputs`` with a terminal output.
    """

    requests: list[Request]


class Abort(msgspec.Struct, tag=True):
    """End a request early. ``rid=None`` means all. Each is answered by its terminal output, if still open."""

    rid: str | None
    message: str = "aborted by the client"


class Command(msgspec.Struct, tag=True):
    """Ask the engine for something other than tokens; answered by ``Reply`` with the same id.

    Attributes:
        name: key of the engine's table of commands (``flush_cache``, ``info``, ``adapters``, ...).
        args: keyword arguments.
    """

    id: int
    name: str
    args: dict[str, object] = {}


class Shutdown(msgspec.Struct, tag=True):
    """End the engine: no new requests; running ones get ``drain_seconds`` to finish, then are aborted."""

    drain_seconds: float = 0.0


class Accepted(msgspec.Struct, tag=True):
    """The request was checked against the adapters and its grammar compiled; outputs will follow."""

    rid: str


class Outputs(msgspec.Struct, tag=True):
    """What one step produced, for all requests it touched."""

    outputs: list[RequestOutput]


class Reply(msgspec.Struct, tag=True):
    """Answer to a ``Command``: ``result`` or, if it failed, ``error`` with the status it deserves."""

    id: int
    result: object = None
    error: str | None = None
    status_code: int = 400


class AdapterTemplates(msgspec.Struct, tag=True):
    """Names of adapters that came, with their chat templates, and those that went, with None.

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


class AdapterView(msgspec.Struct, frozen=True):
    """One meaning of an adapter's name: what requests get, what is being loaded, or what is being unloaded.

    Attributes:
        state: ``loaded``, ``loading`` or ``unloading``.
        version: and what follows: None while it is being loaded.
        report: what it changes in the base model, as JSON.
    """

    name: str
    path: str
    state: str
    pinned: bool
    version: int | None = None
    rank: int | None = None
    targets: list[str] | None = None
    nbytes: int | None = None
    report: bytes | None = None


class AdapterUse(msgspec.Struct, frozen=True):
    """Where a version is, and who uses it.

    Attributes:
        tier: of ``lora/tiers.py``; None: nowhere yet.
        in_flight: requests that hold it.
        last_use: seconds since the epoch, of the newest request's begin or end; None: never.
        reason: why it cannot be read again; None if it can.
    """

    tier: str | None = None
    in_flight: int = 0
    last_use: float | None = None
    reason: str | None = None


class AdaptersChanged(msgspec.Struct, tag=True):
    """What has changed about the adapters. It is sent before whatever follows from it, like ``AdapterTemplates``.

    Attributes:
        names: name -> everything that it means now; empty if it means nothing any more.
        uses: version -> how it is used now; None if it is gone.
    """

    names: dict[str, list[AdapterView]] = {}
    uses: dict[int, AdapterUse | None] = {}


class Progress(msgspec.Struct, tag=True):
    """The engine's state of start-up, shown by the parent (``phase`` is free text for a log)."""

    phase: str


class Ready(msgspec.Struct, tag=True):
    """The engine serves. ``info`` is what ``/get_server_info`` adds (memory split, context length, adapters)."""

    info: dict[str, object]


class Failed(msgspec.Struct, tag=True):
    """The engine could not start or has died.

    Attributes:
        user_error: True if flags or files are to blame (no traceback is shown).
    """

    message: str
    user_error: bool = False


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


ToEngine = Submit | Abort | Command | Shutdown
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
)

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_client = msgspec.msgpack.Decoder(ToClient)


def encode(message: ToEngine | ToClient) -> bytes:
    """Serialise a message of either direction."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Parse what a client sent.

    Raises:
        msgspec.DecodeError: the bytes are no such message.
    """
    return _to_engine.decode(data)


def decode_to_client(data: bytes) -> ToClient:
    """Parse what the engine sent.

    Raises:
        msgspec.DecodeError: the bytes are no such message.
    """
    return _to_client.decode(data)
