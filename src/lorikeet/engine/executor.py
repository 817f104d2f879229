"""What the engine's loop needs of a worker (tests put a double in its place)."""

from __future__ import annotations

from typing import Protocol

from lorikeet.core.adapters import HostBytes
from lorikeet.core.plan import StepPlan, StepResult


class Executor(Protocol):
    """One rank, as the loop sees it."""

    @property
    def max_ahead(self) -> int:
        """Steps that may be submitted before the oldest one is collected: 1 with overlap, else 0."""
        ...

    @property
    def host(self) -> HostBytes | None:
        """Adapters in host memory: what is read, kept and dropped there, beside the steps. None without LoRA."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin a step, behind those that were submitted before.

        Raises:
            OutOfMemoryError: nothing of it was computed or copied.
        """
        ...

    def collect(self) -> StepResult:
        """Wait for the oldest step that was submitted."""
        ...
