"""What is asked: random prompts, and which adapter each request names."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorikeet.core.request import Request, SamplingParams

DISTRIBUTIONS = ("uniform", "zipf", "distinct", "identical", "none")
# Popularity of the k-th adapter is 1 / k, the exponent of most measured request logs.
_ZIPF_EXPONENT = 1.0


def choose_adapters(
    names: Sequence[str], num_requests: int, distribution: str, source: random.Random
) -> list[str | None]:
    """The adapter of each request.

    Args:
        names: the adapters that may be chosen, the most popular first; none at all means the base model.
        distribution: ``uniform`` and ``zipf`` draw, ``distinct`` takes every name in turn (in random order),
            ``identical`` the first one, ``none`` the base model.

    Raises:
        ValueError: an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution {distribution!r}; known: {', '.join(DISTRIBUTIONS)}")
    if not names or distribution == "none":
        return [None] * num_requests
    if distribution == "identical":
        return [names[0]] * num_requests
    if distribution == "distinct":
        chosen = list(itertools.islice(itertools.cycle(names), num_requests))
        source.shuffle(chosen)
        return list(chosen)
    exponent = _ZIPF_EXPONENT if distribution == "zipf" else 0.0
    weights = [1 / place**exponent for place in range(1, len(names) + 1)]
    return list(source.choices(names, weights, k=num_requests))


@dataclass
class Traffic:
    """A source of requests; no two prompts of it begin alike, so no prefix is found in the cache by chance."""

    vocab_size: int
    source: random.Random = field(default_factory=lambda: random.Random(0))

    def prompt(self, length: int) -> list[int]:
        """Random token ids."""
        return self.source.choices(range(self.vocab_size), k=length)

    def request(self, prompt: list[int], num_tokens: int, adapter: str | None) -> Request:
        """A greedy request for exactly ``num_tokens`` tokens."""
        return Request(
            prompt_token_ids=prompt,
            sampling=SamplingParams(temperature=0, max_new_tokens=num_tokens, ignore_eos=True),
            adapter=adapter,
        )

    def requests(
        self, input_len: int, output_len: int, adapters: Sequence[str | None]
    ) -> list[Request]:
        """One request of fixed lengths for each of ``adapters``."""
        return [self.request(self.prompt(input_len), output_len, name) for name in adapters]
