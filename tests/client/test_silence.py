"""Silence is what this process has seen of it, not what a clock says."""

from __future__ import annotations

from lorikeet.client.transport import Silence


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_grows_with_each_look_and_ends_with_news() -> None:
    clock = Clock()
    silence = Silence(1.0, clock)
    for _ in range(5):
        clock.now += 1
        silence.tick()
    assert silence.turn == silence.pulse == 5
    assert silence.exceeds(4)
    assert not silence.exceeds(5)
    silence.heard()
    assert silence.turn == silence.pulse == 0


def test_a_sign_of_life_is_no_turn_of_the_loop() -> None:
    clock = Clock()
    silence = Silence(1.0, clock)
    clock.now += 1
    silence.tick()
    silence.heard(is_pulse=True)
    assert (silence.turn, silence.pulse) == (1, 0)


def test_a_process_that_was_suspended_does_not_blame_the_engine() -> None:
    clock = Clock()
    silence = Silence(1.0, clock)
    clock.now += 3600  # nobody looked
    silence.tick()
    assert silence.turn == silence.pulse == 2
