"""What can be asked of the engine besides tokens, and the answers: one class for each command.

Adding a command means adding a class here, its name to :data:`AnyCommand` and a case to ``EngineCore.command``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from lorikeet.core.views import AdapterDetail

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class LoadOutcome(msgspec.Struct, frozen=True):
    """Answer to a load or an unload.

    Attributes:
        version: that the name means from now on; of an unload, that it meant.
        seconds: from the command to this answer.
    """

    name: str
    path: str
    version: int
    seconds: float


class Command(msgspec.Struct, Generic[R_co], frozen=True):
    """Base of the commands; ``R_co`` is the type of the answer.

    Attributes:
        is_question: the engine answers it between two steps, so that nobody has to wait long.
    """

    is_question: ClassVar[bool] = False


class FlushCache(Command[bool], frozen=True, tag=True):
    """Forget every cached prefix. The answer is False if requests run, which need what is cached."""

    is_question = True


class ListAdapters(Command[list[AdapterDetail]], frozen=True, tag=True):
    """Describe all adapters, or those called ``name``: while one of that name unloads, its successor may be loaded."""

    is_question = True

    name: str | None = None


class FindAdapter(Command[None], frozen=True, tag=True):
    """Let the resolver look for a name that is not loaded; answered when it has. Whether it was found is seen by using it."""

    name: str


class LoadAdapter(Command[LoadOutcome], frozen=True, tag=True):
    """Load an adapter from a directory, a hub id or a URL.

    Attributes:
        pinned: on the device from now on.
        replace: if the name is loaded, it means the new content from now on.
    """

    name: str
    path: str
    pinned: bool = False
    replace: bool = False


class LoadAdapterFromTensors(Command[LoadOutcome], frozen=True, tag=True):
    """Load an adapter whose weights were sent.

    Attributes:
        config: what its ``adapter_config.json`` would hold.
        weights: a safetensors file, alone in its directory, which is the engine's from now on.
    """

    name: str
    config: dict[str, Any]
    weights: str
    pinned: bool = False


class UnloadAdapter(Command[LoadOutcome], frozen=True, tag=True):
    """Refuse new requests for an adapter at once; answered when the last one that runs has ended.

    Attributes:
        timeout: seconds after which the answer is an error that says how many still run; None waits.
    """

    name: str
    timeout: float | None = None


AnyCommand = (
    FlushCache | ListAdapters | FindAdapter | LoadAdapter | LoadAdapterFromTensors | UnloadAdapter
)
Result = LoadOutcome | list[AdapterDetail] | bool | None
