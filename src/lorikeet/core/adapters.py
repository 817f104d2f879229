"""What rank 0, which decides about adapters, and the host memories of the ranks, which hold their bytes, tell each other.

Rank 0 orders reads and is told facts. It never sees a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from concurrent.futures import Future
from typing import Any, Literal, Protocol, cast

import msgspec

Trust = Literal["operator", "resolver", "request"]
"""Who has named a path: the operator (``--lora-paths``, or this process itself), who may name any; a request through the
resolver's directory; or a request by itself."""

TENSORS_PATH = "__tensor__"
"""What is shown as the path of an adapter that was sent as tensors."""


class Origin(msgspec.Struct, frozen=True):
    """Where an adapter's bytes can be read, the first time and after every eviction.

    Attributes:
        path: as the user named it; what replies and lists show.
        trust: who has named it, which decides where it may lead.
        spool: directory that a client's tensors were written to, and that is removed with it.
        pinned: ``path`` with the commit of a hub id, so that a branch that moves on changes nothing; None if the same.
    """

    path: str
    trust: Trust = "request"
    spool: str | None = None
    pinned: str | None = None


class SentTensors(msgspec.Struct, frozen=True):
    """An adapter that a client has sent: its configuration, and the safetensors file that its weights were written to."""

    config: Mapping[str, object]
    weights: str


class ReadOrder(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter to be read.

    Attributes:
        name: it is read for.
        origins: where it may be, asked one after the other; empty: the resolver is asked for the name.
        digest: of what is read again, so that other bytes are refused; None: it is read for the first time.
        sent: set if it has just been sent, to the directory of the only origin.
    """

    name: str
    origins: tuple[Origin, ...] = ()
    digest: str | None = None
    sent: SentTensors | None = None


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 needs to know of an adapter to decide about it.

    Attributes:
        digest: sha256 (hex) of what it computes; equal digests, equal answers. All ranks must agree on it.
        origin: where it was read, as it is to be read again.
        page_classes: class of each of its rank pages in the pool's layout, in the order of the pages.
        rank: the largest of any module.
        targets: names of the modules that it changes, sorted.
        nbytes: of host memory on this rank, and of its device when it is there.
        report: what it changes in the base model; empty if it was read again.
        chat_templates: that its directory brings, name -> Jinja source; none if it was read again.
    """

    digest: str
    origin: Origin
    page_classes: tuple[int, ...]
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    report: dict[str, object] = {}
    chat_templates: dict[str, str] = {}


class HostBytes(Protocol):
    """The host memory of every rank, as rank 0 sees it. Nothing here waits.

    A read has a ticket, a number that is never used again, because the version of what it brings is known only at its
    end. ``reads_done`` tells of it once; what it has brought then waits for ``keep`` or ``cancel``, and one that has failed
    leaves nothing.
    """

    def read(self, ticket: int, order: ReadOrder) -> None:
        """Begin to read."""
        ...

    def reads_done(self) -> list[tuple[int, AdapterFacts | BaseException]]:
        """Reads that have ended since the last call, with what was read or why nothing was."""
        ...

    def keep(self, ticket: int, version: int) -> None:
        """What a read has brought are the bytes of a version. If those are held already, the new ones go."""
        ...

    def cancel(self, ticket: int) -> None:
        """Nobody wants what a read brings or has brought: it is ended, and what was sent for it is removed."""
        ...

    def drop(self, version: int) -> None:
        """A version's bytes go. A copy that is on its way has them until its end."""
        ...

    def forget(self, origin: Origin) -> None:
        """An origin is not read again: what was written for it is removed."""
        ...

    def pending(self) -> list[Future[Any]]:
        """To wait for, if there is nothing else to do: done when ``reads_done`` has something to tell."""
        ...

    def check_integrity(self, versions: Set[int], tickets: Set[int]) -> None:
        """Assert that these versions are held, and these reads under way, and no others."""
        ...


def format_report(report: dict[str, object]) -> str:
    """An adapter's report as one line for the log."""
    fields = cast("dict[str, Any]", report)
    modules, (least, most) = fields["modules"], fields["scale"]
    scale = f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"
    relative = fields["relative_norm"]
    return (
        f"rank {fields['rank']}, {modules['hit']} of {modules['targeted']} targeted modules hit "
        f"(the model has {modules['in_model']}), targets {','.join(fields['targets'])}, scale {scale}, "
        f"norm of the change {fields['delta_norm']:.4g}"
        + (f" ({relative:.2%} of the base)" if relative is not None else "")
        + f", {fields['bytes'] / 1e6:.2f} MB"
    )
