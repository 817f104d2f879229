"""Work in turns: the loop looks at its sockets between them."""

from __future__ import annotations

import asyncio

import pytest

from lorikeet.client import turns
from lorikeet.client.turns import give_way


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds; who works adds to it."""
    now = [0.0]
    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    return now


async def run(clock: list[float], num_tasks: int, num_things: int) -> list[str]:
    """Tasks that work a hundredth of a second for each thing, and what happens in which iteration of the loop."""
    story: list[str] = []

    async def work(number: int) -> None:
        for _ in range(num_things):
            await give_way()
            clock[0] += 0.01
            story.append(str(number))

    def iterate() -> None:
        story.append("|")
        if not done():
            asyncio.get_running_loop().call_soon(iterate)

    def done() -> bool:
        return all(task.done() for task in tasks)

    tasks = [asyncio.create_task(work(number)) for number in range(num_tasks)]
    asyncio.get_running_loop().call_soon(iterate)
    await asyncio.gather(*tasks)
    return story


def test_no_iteration_is_long(clock: list[float]) -> None:
    for num_tasks, num_things in ((1, 40), (40, 1), (8, 5)):
        story = "".join(asyncio.run(run(clock, num_tasks, num_things))).strip("|")
        assert max(map(len, story.split("|"))) <= 4
        assert len(story.replace("|", "")) >= 40


def test_who_came_first_goes_on_first(clock: list[float]) -> None:
    story = asyncio.run(run(clock, 30, 1))
    assert [item for item in story if item != "|"] == [str(number) for number in range(30)]


def test_little_work_does_not_wait(clock: list[float]) -> None:
    async def quick() -> int:
        num_iterations = 0

        def count() -> None:
            nonlocal num_iterations
            num_iterations += 1
            asyncio.get_running_loop().call_soon(count)

        asyncio.get_running_loop().call_soon(count)
        for _ in range(1000):
            await give_way()
        return num_iterations

    assert asyncio.run(quick()) == 0
