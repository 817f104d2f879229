"""How much of a step is left while it is being planned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What the scheduler must keep to; fixed for the life of the engine.

    Attributes:
        max_running: sequences that run at a time.
        max_step_tokens: tokens computed in a step (chunked prefill); decoding sequences claim theirs first.
        max_prefill_tokens: prompt tokens computed in a step.
        context_length: tokens of a prompt and its completion together.
        max_loras_per_batch: distinct adapters among the running sequences; the base model does not count.
        eos_token_ids: tokens that end a completion unless the request ignores them.
        policy: ``fcfs`` (first come, first served) or ``lpm`` (longest cached prefix first).
        max_passes: requests that may be admitted before one that came earlier and waits for room for its adapter
            (or, with ``lpm``, has a shorter cached prefix).
        max_queued: sequences that may wait; None for any number. Kept to by whoever adds sequences.
    """

    max_running: int
    max_step_tokens: int
    max_prefill_tokens: int
    context_length: int
    max_loras_per_batch: int
    eos_token_ids: frozenset[int]
    policy: str = "fcfs"
    max_passes: int = 64
    max_queued: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "max_running",
            "max_step_tokens",
            "max_prefill_tokens",
            "context_length",
            "max_loras_per_batch",
            "max_passes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.policy not in ("fcfs", "lpm"):
            raise ValueError(f"schedule policy {self.policy!r}; known: fcfs, lpm")


@dataclass(slots=True)
class StepBudget:
    """What the step being planned can still take. Pages are not counted here: what an eviction yields only
    ``KVManager`` knows.

    Attributes:
        tokens: prompt tokens.
        sequences: sequences that may still be admitted.
        adapters: adapters that may still begin to run beside those that already do.
    """

    tokens: int
    sequences: int
    adapters: int

    @classmethod
    def for_step(
        cls, limits: SchedulerLimits, *, num_rows: int, num_running: int, num_adapters: int
    ) -> StepBudget:
        """Budget once the rows of decoding sequences have had their share."""
        return cls(
            tokens=max(0, min(limits.max_step_tokens - num_rows, limits.max_prefill_tokens)),
            sequences=limits.max_running - num_running,
            adapters=limits.max_loras_per_batch - num_adapters,
        )

    @property
    def can_admit(self) -> bool:
        return self.tokens > 0 and self.sequences > 0
