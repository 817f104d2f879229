"""How long the engine has been silent, as far as this process can tell."""

from __future__ import annotations

import time
from collections.abc import Callable

# A longer pause between two looks says nothing of the engine: this process was stopped, the machine asleep or overloaded.
MAX_TICKS = 2


class Silence:
    """Seconds without news, counted only while this process looks.

    A clock alone would call the engine silent when it is this process that was suspended, or that has not come to read
    what is there.

    Args:
        tick: seconds between two looks.
    """

    def __init__(self, tick: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = MAX_TICKS * tick
        self._clock = clock
        self._looked = clock()
        self.turn = 0.0
        self.pulse = 0.0

    def heard(self, *, is_pulse: bool = False) -> None:
        """There is news: from the engine's loop, or only that its process lives."""
        self.pulse = 0.0
        if not is_pulse:
            self.turn = 0.0

    def tick(self) -> None:
        """Look at the clock."""
        now = self._clock()
        passed = min(now - self._looked, self._most)
        self._looked = now
        self.turn += passed
        self.pulse += passed

    def exceeds(self, seconds: float) -> bool:
        """True if the loop has said nothing for so long, whether or not its process lives."""
        return self.turn > seconds
