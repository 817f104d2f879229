"""How much of a step is left while it is being planned."""

from __future__ import annotations

from dataclasses import dataclass

_HIGHEST_PRICE = 16


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
        vocab_size: how many tokens there are to choose from.
        even_length: tokens of context up to which a prompt's tokens cost about the same, because attention costs less
            than the rest of the network; None if they always do.
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
    vocab_size: int | None = None
    even_length: int | None = None

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
        if self.even_length is not None and self.even_length < 1:
            raise ValueError(f"even_length is {self.even_length}; at least 1 is needed")
        if self.policy not in ("fcfs", "lpm"):
            raise ValueError(f"schedule policy {self.policy!r}; known: fcfs, lpm")

    def length_class(self, num_tokens: int) -> int:
        """Prompts of one class are served in order, shorter classes pass longer ones (``scheduler/scheduler.py``).

        Class 0 fits in half of a step; each further class takes twice as long as the one before.
        """
        half = max(1, min(self.max_step_tokens, self.max_prefill_tokens) // 2)
        return ((num_tokens - 1) // half).bit_length()

    def price(self, position: int) -> int:
        """What computing a prompt's token at ``position`` costs, in tokens of a short prompt.

        Steps should take about the same time wherever in a prompt they are; otherwise everybody else would wait longer,
        the longer somebody's prompt is. The highest price keeps chunks large enough to be worth a step.
        """
        if self.even_length is None:
            return 1
        return min(_HIGHEST_PRICE, max(1, position // self.even_length))


@dataclass(slots=True)
class StepBudget:
    """What the step being planned can still take. Pages are not counted here: what an eviction yields only
    ``KVManager`` knows.

    Attributes:
        tokens: prompt tokens, by their price.
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

    def take(self, num_wanted: int, price: int) -> int:
        """Spend tokens on at most ``num_wanted`` of a prompt. Returns how many; at least one if there are any."""
        num = min(num_wanted, max(1, self.tokens // price))
        self.tokens -= num * price
        return num

    @property
    def can_admit(self) -> bool:
        return self.tokens > 0 and self.sequences > 0
