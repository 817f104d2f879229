"""How sequences let go: preempted, aborted, failed, finished ahead of the commit."""

from __future__ import annotations

import pytest

from lorikeet.core.failure import Failure
from lorikeet.core.request import (
    FinishReason,
    SamplingParams,
)
from lorikeet.core.sequence import SequenceState
from lorikeet.errors import RequestError
from tests.support.scheduler_rig import ABORT, Rig, alone


def test_the_youngest_is_preempted_and_loses_nothing() -> None:
    # Eight pages: both prompts fit, both completions do not.
    rig = Rig(num_pages=8)
    old, young = rig.add(8, max_new=20), rig.add(9, max_new=20)
    while young.state is not SequenceState.PREEMPTED:
        rig.step()
        assert old.state is SequenceState.DECODING
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (1, 1)
    assert rig.scheduler.stats().total_preemptions == 1
    rig.run()
    assert rig.tokens_of(old) == alone(8, 20)
    assert rig.tokens_of(young) == alone(9, 20)
    assert {output.cached_tokens for output in rig.outputs[1]} == {young.cached_tokens}
    assert rig.kv.num_available == 8


def test_a_restart_tells_the_worker_what_was_generated() -> None:
    rig = Rig(num_pages=8)
    rig.add(8, max_new=20)
    young = rig.add(9, max_new=20)
    plan = rig.step()
    while young.state is not SequenceState.PREEMPTED:
        plan = rig.step()
    assert plan.ended == [young.id]
    generated = young.num_output
    while young.state is SequenceState.PREEMPTED:
        plan = rig.step()
    (start,) = plan.starts
    assert (start.num_prompt, len(start.token_ids)) == (9, 9 + generated)


def test_too_long_for_the_pool_is_refused_with_numbers() -> None:
    rig = Rig(num_pages=4)
    with pytest.raises(RequestError, match=r"20 tokens.*16 tokens \(4 pages of 4\)"):
        rig.add(20)
    assert rig.scheduler.plan() is None


def test_as_long_as_the_whole_pool_runs() -> None:
    rig = Rig(num_pages=4)
    seq = rig.add(10, max_new=7)
    other = rig.add(3, max_new=9)
    rig.run()
    assert rig.end_of(seq).kind == rig.end_of(other).kind == "length"
    assert rig.tokens_of(seq) == alone(10, 7)


def test_short_of_pages_nobody_passes() -> None:
    rig = Rig(num_pages=8, radix=False)
    rig.add(20, max_new=2)
    rig.step()
    rig.add(20, max_new=2)
    rig.add(2, max_new=2)
    assert rig.step().starts == []
    assert rig.scheduler.num_waiting == 2
    rig.run()
    assert len(rig.outputs) == 3


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_abort_at_any_moment_frees_everything(num_steps: int) -> None:
    rig = Rig(max_step_tokens=4)
    seq, other = rig.add(10, version=1, max_new=6), rig.add(10, version=1, max_new=6)
    for _ in range(num_steps):
        rig.step()
    rig.scheduler.abort(seq.id, ABORT)
    rig.scheduler.abort(seq.id, ABORT)
    rig.collect()
    assert rig.end_of(seq) == ABORT
    rig.run()
    assert rig.end_of(other).kind == "length"
    assert rig.kv.num_available == 32
    assert (rig.residency.num_uses(1), rig.worker.rows) == (0, {})


def test_abort_while_the_step_runs_drops_its_token() -> None:
    rig = Rig()
    seq = rig.add(6)
    plan = rig.plan()
    rig.worker.submit(plan)
    rig.scheduler.abort(seq.id, ABORT)
    rig.commit(plan)
    assert (rig.end_of(seq), rig.tokens_of(seq)) == (ABORT, [])


def test_abort_of_an_unknown_sequence_has_no_effect() -> None:
    rig = Rig()
    rig.scheduler.abort(77, ABORT)
    assert rig.scheduler.drain() == []


def test_one_failed_token_ends_one_sequence() -> None:
    rig = Rig()
    bad, good = rig.add(6), rig.add(6)
    rig.failing_tokens = {bad.id}
    rig.run()
    assert rig.end_of(bad) == FinishReason(
        kind="abort", failure=Failure("failed", "the test says so")
    )
    assert rig.end_of(good).kind == "length"


def test_a_failed_copy_ends_its_sequences_only() -> None:
    rig = Rig()
    rig.failing = {1}
    bad, good, base = rig.add(10, version=1), rig.add(10, version=2), rig.add(10)
    rig.step()
    assert "copied to the device" in (rig.end_of(bad).message or "")
    assert rig.end_of(bad).status_code == 500
    rig.failing = set()
    again = rig.add(10, version=1)
    rig.run()
    for seq in (good, base, again):
        assert rig.end_of(seq).kind == "length"


def test_planning_ahead_of_the_commit() -> None:
    rig = Rig()
    seq = rig.add(6, max_new=3)
    first = rig.plan()
    rig.worker.submit(first)
    second = rig.plan()
    assert [(row.seq, row.position) for row in second.rows] == [(seq.id, 6)]
    with pytest.raises(ValueError, match="two plans"):
        rig.scheduler.plan()
    rig.worker.submit(second)
    rig.commit(first)
    third = rig.plan()
    rig.worker.submit(third)
    rig.commit(second)
    assert rig.scheduler.plan() is None, "the third token is on its way, and it is the last"
    rig.commit(third)
    assert rig.end_of(seq) == FinishReason(kind="length", length=3)
    assert rig.tokens_of(seq) == alone(6, 3)


def test_the_row_after_the_end_is_dropped() -> None:
    rig = Rig()
    token = alone(6, 1)[0]
    seq = rig.add(6, max_new=9)
    seq.request.sampling = SamplingParams(max_new_tokens=9, stop_token_ids=(token,))
    seq.stop_tokens = frozenset({token})
    first = rig.plan()
    rig.worker.submit(first)
    second = rig.plan()
    rig.worker.submit(second)
    rig.commit(first)
    assert rig.end_of(seq) == FinishReason(kind="stop", matched=token)
    rig.commit(second)
    assert rig.tokens_of(seq) == [token]
    assert rig.step().ended == [seq.id]
    assert rig.kv.num_available == 32


def test_an_adapter_stays_until_the_last_step_with_it_is_committed() -> None:
    rig = Rig(max_loras=1)
    seq = rig.add(6, version=1, max_new=9)
    rig.step()
    rig.step()
    first = rig.plan()
    rig.worker.submit(first)
    rig.scheduler.abort(seq.id, ABORT)
    rig.add(6, version=2)
    second = rig.plan()
    assert second.copies == [], "step one still computes with the slot"
    rig.worker.submit(second)
    rig.commit(first)
    assert [copy.version for copy in rig.plan().copies] == [2]


def test_a_step_that_was_not_executed() -> None:
    rig = Rig(max_running=2)
    rig.residency.set_pinned(1, pinned=True)
    rig.step()
    largest, other = rig.add(11, version=1), rig.add(10)
    waiting = rig.add(10, version=1)
    plan = rig.plan()
    rig.scheduler.fail(plan, "out of memory")
    rig.collect()
    assert rig.end_of(largest) == FinishReason(
        kind="abort", failure=Failure("failed", "out of memory")
    )
    assert rig.kv.match(1, waiting.tokens, 9) == 0, "nothing was computed"
    rig.worker.ignored = {largest.id, other.id}
    assert [start.seq for start in rig.step().starts] == [other.id, waiting.id]
    rig.run()
    assert rig.tokens_of(other) == alone(10, 4), "it lost nothing but time"
    assert rig.end_of(waiting).kind == "length"
    assert rig.kv.num_available == 32


def test_a_step_without_memory_ends_its_largest_prompt_and_no_sequence_that_decodes() -> None:
    rig = Rig(num_pages=64, max_step_tokens=58)
    old = [rig.add(6, max_new=9), rig.add(7, max_new=9)]
    rig.step()
    rig.step()
    prompt, waiting = rig.add(60, max_new=3), rig.add(40, max_new=3)
    plan = rig.plan()
    assert ([row.seq for row in plan.rows], [c.seq for c in plan.chunks]) == ([0, 1], [prompt.id])
    rig.scheduler.fail(plan, "out of memory")
    rig.collect()
    assert rig.end_of(prompt).message == "out of memory"
    rig.worker.ignored = {prompt.id}
    assert [start.seq for start in rig.step().starts[:2]] == [0, 1], "oldest first, as before"
    rig.run()
    for seq, num_prompt in zip(old, (6, 7), strict=True):
        assert rig.end_of(seq).kind == "length"
        assert rig.tokens_of(seq) == alone(num_prompt, 9)
    assert rig.end_of(waiting).kind == "length"
    assert rig.kv.num_available == 64


def test_a_decode_step_without_memory_ends_the_youngest() -> None:
    rig = Rig(num_pages=64)
    first, second, third = (rig.add(6 + index, max_new=9) for index in range(3))
    rig.step()
    plan = rig.plan()
    rig.scheduler.fail(plan, "out of memory")
    rig.run()
    assert rig.end_of(third).kind == "abort"
    for seq, num_prompt in ((first, 6), (second, 7)):
        assert rig.tokens_of(seq) == alone(num_prompt, 9)


def test_only_the_newest_plan_can_fail() -> None:
    rig = Rig()
    rig.add(6)
    first = rig.plan()
    rig.plan()
    with pytest.raises(ValueError, match="in flight"):
        rig.scheduler.fail(first, "out of memory")


def test_copies_of_a_step_that_was_not_executed_are_decided_again() -> None:
    rig = Rig(max_loras=1)
    seq = rig.add(6, version=1)
    plan = rig.plan()
    assert [copy.version for copy in plan.copies] == [1]
    rig.scheduler.fail(plan, "out of memory")
    assert rig.scheduler.num_waiting == 1
    again = rig.step()
    assert (again.freed_slots, [copy.version for copy in again.copies]) == ([1], [1])
    rig.run()
    assert rig.end_of(seq).kind == "length"
