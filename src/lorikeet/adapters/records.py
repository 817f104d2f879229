"""What the store of adapters remembers besides what registry and residency do: versions, commands under way, numbers."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field

from lorikeet.adapters.registry import AdapterRegistry
from lorikeet.adapters.residency import Residency
from lorikeet.core.adapters import AdapterFacts, Origin
from lorikeet.core.commands import LoadOutcome
from lorikeet.errors import AdapterError, EngineFault, LorikeetError
from lorikeet.masking import printable, shortened, without_paths

logger = logging.getLogger(__name__)

# Measurements kept until somebody collects them; nobody does in offline use.
MAX_SAMPLES = 1024

BASE_VERSION = 0

# Seconds until a version that could not be read is read again if somebody asks for it (or if it is pinned): the first
# and the longest wait, each twice as long as the one before.
FIRST_RETRY_S = 10.0
LAST_RETRY_S = 600.0


@dataclass(slots=True, eq=False)
class Load:
    """A name that is being loaded.

    Attributes:
        ticket: of its read, until its bytes are a version's or given up.
        found: it is not a command's, but a request's for a name that the resolver may know.
        waiting: one future for each request that waits for the name; each is told the end, or cancelled by itself.
    """

    name: str
    path: str
    pinned: bool
    replace: bool
    began: float
    ticket: int | None = None
    reply: Future[LoadOutcome] = field(default_factory=Future[LoadOutcome])
    found: bool = False
    waiting: list[Future[None]] = field(default_factory=list[Future[None]])

    @property
    def is_abandoned(self) -> bool:
        """True if whoever asked for it has gone and nobody else waits for it."""
        return self.reply.cancelled() and all(waiter.cancelled() for waiter in self.waiting)

    def succeed(self, outcome: LoadOutcome) -> None:
        if self.reply.set_running_or_notify_cancel():
            self.reply.set_result(outcome)
        for waiter in self.waiting:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Tell everybody who waits why it failed. Requests are not told where files lie, which is the operator's matter."""
        if self.reply.set_running_or_notify_cancel():
            self.reply.set_exception(error)
        told = AdapterError(without_paths(str(error))) if type(error) is AdapterError else error
        for waiter in self.waiting:
            if waiter.set_running_or_notify_cancel():
                waiter.set_exception(told)


@dataclass(slots=True, eq=False)
class Unload:
    """A name that is hidden and whose version is still in use.

    Attributes:
        nbytes: of host memory, freed at the end.
        deadline: when whoever waits for it is told that it takes longer; None: they wait.
        counts: it was asked for; False for the old content of a name that was replaced.
    """

    name: str
    path: str
    version: int
    nbytes: int
    began: float
    deadline: float | None = None
    counts: bool = True
    reply: Future[LoadOutcome] = field(default_factory=Future[LoadOutcome])


@dataclass(slots=True, eq=False)
class AdapterRecord:
    """A version that somebody can still use: everything that the store knows of it.

    Attributes:
        facts: of its first load, without templates.
        origins: name -> where its bytes can be read, newest last.
        holders: ids of the completions that lease it.
        last_use: seconds since the epoch, of the newest lease or its end; None: never.
        cold_since: when the first of those that wait for it to come to the device came; None if nobody waits.
        is_held: its bytes are in host memory, and count as such.
        is_kept: its bytes are there though they were evicted: no name means it any more, its files may have been
            overwritten by its successor's, and requests still wait for it.
        ticket: of the read that is under way.
        read_began: when it did.
        retry_at: when it may be read again after it could not be read.
        retry_seconds: how long it is not read again if it cannot be read the next time.
    """

    version: int
    facts: AdapterFacts
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    holders: dict[int, None] = field(default_factory=dict[int, None])
    last_use: float | None = None
    cold_since: float | None = None
    is_held: bool = False
    is_kept: bool = False
    ticket: int | None = None
    read_began: float = 0.0
    retry_at: float = 0.0
    retry_seconds: float = FIRST_RETRY_S

    def add_origin(self, name: str, origin: Origin, *, is_alone: bool) -> list[Origin]:
        """``name`` means this version from now on, and no other does if it ``is_alone``. Returns origins to forget."""
        gone = [self.origins.pop(name)] if name in self.origins else []
        if is_alone:
            # The last name that was unloaded has left its origin, for requests that still run.
            gone += self.origins.values()
            self.origins.clear()
        self.origins[name] = origin
        return gone


@dataclass(slots=True)
class AdapterCounters:
    """Counts since the start, and measurements since they were last collected, in seconds."""

    loads: int = 0
    load_failures: int = 0
    unloads: int = 0
    host_evictions: int = 0
    reloads: int = 0
    samples: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def sample(self, name: str, seconds: float) -> None:
        values = self.samples.setdefault(name, [])
        if len(values) < MAX_SAMPLES:
            values.append(seconds)

    def take_samples(self) -> dict[str, list[float]]:
        taken, self.samples = self.samples, {}
        return taken

    def values(self) -> dict[str, float]:
        return {
            "total_adapter_loads": float(self.loads),
            "total_adapter_load_failures": float(self.load_failures),
            "total_adapter_unloads": float(self.unloads),
            "total_adapter_host_evictions": float(self.host_evictions),
            "total_adapter_reloads": float(self.reloads),
        }


def as_fault(error: BaseException, name: str) -> BaseException:
    """What the caller is told: what was raised on purpose as it is, anything else as a fault of ours. An adapter's files
    may put anything into a message: it leaves here as text that can be shown and sent."""
    if isinstance(error, AdapterError):
        return error if str(error).isprintable() else AdapterError(printable(str(error)))
    if isinstance(error, LorikeetError):
        return error
    logger.error("loading adapter %s failed", name, exc_info=error)
    reason = printable(f"{type(error).__name__}: {error}")
    return EngineFault(f"loading adapter '{shortened(name)}' failed: {reason}")


@dataclass(slots=True, eq=False)
class StoreState:
    """What the parts of the store share, and each of them may change.

    Attributes:
        records: version -> what is known of it, for each that the registry knows.
        loads: name -> its load, while it is under way.
        unloads: names that are hidden and whose versions are in use.
    """

    registry: AdapterRegistry
    residency: Residency
    records: dict[int, AdapterRecord] = field(default_factory=dict[int, AdapterRecord])
    loads: dict[str, Load] = field(default_factory=dict[str, Load])
    unloads: list[Unload] = field(default_factory=list[Unload])
    counters: AdapterCounters = field(default_factory=AdapterCounters)
