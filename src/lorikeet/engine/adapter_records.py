"""What the engine remembers of adapters besides what registry and residency do: commands under way, numbers, times."""

from __future__ import annotations

import logging
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field

from lorikeet.engine.adapter_reader import Origin, ReadAdapter
from lorikeet.errors import EngineFault, LorikeetError
from lorikeet.lora.report import format_report

logger = logging.getLogger(__name__)

# Measurements kept until somebody collects them; nobody does in offline use.
MAX_SAMPLES = 1024


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """Answer to a load or an unload.

    Attributes:
        version: that the name means from now on; of an unload, that it meant.
        seconds: from the command to this answer.
        loaded_adapters: name -> path, after it.
    """

    name: str
    path: str
    version: int
    seconds: float
    loaded_adapters: dict[str, str]


@dataclass(slots=True, eq=False)
class Load:
    """A name that is being loaded.

    Attributes:
        found: it is not a command's, but a request's for a name that the resolver may know.
    """

    name: str
    path: str
    pinned: bool
    replace: bool
    began: float
    read: Future[ReadAdapter]
    reply: Future[LoadOutcome] = field(default_factory=Future[LoadOutcome])
    found: bool = False

    @property
    def is_over(self) -> bool:
        return self.read.done() or self.reply.cancelled()


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


@dataclass(slots=True)
class Known:
    """About a version that the registry knows.

    Attributes:
        digest: of its content.
        origins: name -> where its bytes can be read, newest last.
        report: of its first load.
        holders: ids of the completions that lease it.
        last_use: seconds since the epoch, of the newest lease or its end; None: never.
    """

    digest: str
    report: dict[str, object]
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    holders: dict[int, None] = field(default_factory=dict[int, None])
    last_use: float | None = None

    def add_origin(self, name: str, origin: Origin, names: Collection[str]) -> list[Origin]:
        """``name`` means this version from now on; so do ``names`` and no others. Returns origins to forget."""
        gone = [self.origins.pop(name)] if name in self.origins else []
        gone += [self.origins.pop(other) for other in self.origins.keys() - set(names)]
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
    """What the caller is told: what was raised on purpose as it is, anything else as a fault of ours."""
    if isinstance(error, LorikeetError):
        return error
    logger.error("loading adapter %s failed", name, exc_info=error)
    return EngineFault(f"loading adapter {name!r} failed: {type(error).__name__}: {error}")


def log_load(name: str, version: int, read: ReadAdapter, seconds: float) -> None:
    adapter = read.adapter
    logger.info(
        "Adapter %s loaded: version %d, %.2f MB, %.0f ms, %s",
        name,
        version,
        adapter.nbytes / 1e6,
        seconds * 1e3,
        format_report(read.report) if read.report else f"rank {adapter.rank}",
    )
