from __future__ import annotations

import pytest

from lorikeet.adapters.tiers import Tier
from lorikeet.core.failure import Failure
from lorikeet.core.plan import SampledToken, StepPlan, StepResult
from lorikeet.core.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
)
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.errors import RequestError
from tests.support.scheduler_rig import ABORT, Rig


def test_nothing_to_do() -> None:
    rig = Rig()
    assert not rig.scheduler.has_work
    assert rig.scheduler.plan() is None


def test_a_pinned_adapter_is_work_without_a_request() -> None:
    rig = Rig()
    rig.residency.set_pinned(3, pinned=True)
    assert rig.scheduler.has_work
    plan = rig.step()
    assert (plan.is_empty, [copy.version for copy in plan.copies]) == (True, [3])
    assert not rig.scheduler.has_work


def test_one_request_from_start_to_end() -> None:
    rig = Rig()
    seq = rig.add(6, max_new=3)
    plan = rig.step()
    (start,), (chunk,) = plan.starts, plan.chunks
    assert (start.token_ids, start.num_prompt, start.num_cached, start.slot, start.seed) == (
        [0, 1, 2, 3, 4, 5],
        6,
        0,
        0,
        5,
    )
    assert (chunk.start, chunk.end, chunk.sample, chunk.new_page_ids) == (0, 6, True, [0, 1])
    second = rig.step()
    assert [(row.position, row.new_page_ids) for row in second.rows] == [(6, [])]
    third = rig.step()
    assert [(row.position, row.new_page_ids) for row in third.rows] == [(7, [])]
    assert rig.end_of(seq) == FinishReason(kind="length", length=3)
    assert seq.state is SequenceState.FINISHED
    assert rig.scheduler.has_work
    assert rig.step().ended == [seq.id], "the worker may forget it"
    assert not rig.scheduler.has_work
    assert rig.scheduler.plan() is None
    assert not rig.worker.rows


def test_a_page_is_added_at_each_boundary() -> None:
    rig = Rig()
    rig.add(7, max_new=8)
    rig.step()
    pages = [rig.step().rows[0].new_page_ids for _ in range(6)]
    assert [len(new) for new in pages] == [0, 1, 0, 0, 0, 1]


def test_prompts_are_cut_and_mixed_with_decoding_rows() -> None:
    rig = Rig(max_step_tokens=8)
    rig.add(4, max_new=20)
    rig.step()
    long = rig.add(17, max_new=2)
    chunks: list[tuple[int, int, bool]] = []
    while long.state is not SequenceState.DECODING:
        plan = rig.step()
        assert len(plan.rows) == 1, "decoding goes on"
        assert plan.num_tokens <= 8
        chunks.extend((chunk.start, chunk.end, chunk.sample) for chunk in plan.chunks)
    # The first four tokens are those of the other prompt.
    assert chunks == [(4, 11, False), (11, 17, True)]
    assert long.cached_tokens == 4


def test_two_prompts_share_what_is_left_of_a_step() -> None:
    rig = Rig(max_step_tokens=10, radix=False)
    rig.add(7)
    rig.add(7)
    first, second = rig.step(), rig.step()
    assert [(c.seq, c.start, c.end, c.sample) for c in first.chunks] == [
        (0, 0, 7, True),
        (1, 0, 3, False),
    ]
    assert [(c.seq, c.start, c.end, c.sample) for c in second.chunks] == [(1, 3, 7, True)]
    assert [row.seq for row in second.rows] == [0]


def test_max_running() -> None:
    rig = Rig(max_running=2)
    for _ in range(3):
        rig.add(4, max_new=2)
    assert len(rig.step().starts) == 2
    assert (rig.scheduler.num_running, rig.scheduler.num_waiting) == (2, 1)
    rig.step()
    assert len(rig.step().starts) == 1


def test_max_new_tokens_zero_computes_the_prompt_only() -> None:
    rig = Rig()
    seq = rig.add(6, max_new=0, return_logprob=True, logprob_start_len=0)
    rig.run()
    assert rig.end_of(seq) == FinishReason(kind="length", length=0)
    (output,) = rig.outputs[0]
    assert (output.token_ids, output.logprobs) == ([], [])
    assert [entry.token_id for entry in output.prompt_logprobs] == [0, 1, 2, 3, 4, 5]


def test_prompt_logprobs_come_once_with_the_first_token() -> None:
    rig = Rig(max_step_tokens=4)
    seq = rig.add(10, max_new=2, return_logprob=True, logprob_start_len=2)
    rig.run()
    first, second = rig.outputs[0]
    assert [entry.token_id for entry in first.prompt_logprobs] == list(range(2, 10))
    assert second.prompt_logprobs == []
    assert [entry.token_id for entry in (*first.logprobs, *second.logprobs)] == rig.tokens_of(seq)


def test_prompt_logprobs_limit_the_cache_hit() -> None:
    rig = Rig()
    rig.add(12)
    rig.run()
    rig.add(12)
    rig.add(12, return_logprob=True, logprob_start_len=6)
    rig.add(12, return_logprob=True, logprob_start_len=0)
    assert [start.num_cached for start in rig.step().starts] == [8, 4, 0]


def test_siblings_hit_the_prompt_that_is_computed_in_the_same_step() -> None:
    rig = Rig()
    seqs = [rig.add(10) for _ in range(3)]
    plan = rig.step()
    assert [start.num_cached for start in plan.starts] == [0, 8, 8]
    rig.run()
    assert len({tuple(rig.tokens_of(seq)) for seq in seqs}) == 1
    assert [rig.outputs[i][0].cached_tokens for i in range(3)] == [0, 8, 8]


def test_the_second_turn_hits_the_first_answer() -> None:
    rig = Rig()
    first = rig.add(10, max_new=8)
    rig.run()
    history = [*range(10), *rig.tokens_of(first), 1, 2]
    request = Request(prompt_token_ids=history, sampling=SamplingParams())
    rig.scheduler.add(Sequence(99, request, 0, 0))
    assert rig.step().starts[0].num_cached == 16, "all but the last token of the answer is computed"


def test_another_version_hits_nothing() -> None:
    rig = Rig()
    rig.add(10)
    rig.run()
    rig.add(10, version=1)
    rig.step()
    assert rig.step().starts[0].num_cached == 0


def test_without_radix_nothing_is_cached() -> None:
    rig = Rig(radix=False)
    rig.add(10)
    rig.run()
    seq = rig.add(10)
    rig.run()
    assert rig.outputs[seq.id][0].cached_tokens == 0


def test_an_adapter_is_copied_while_others_run() -> None:
    rig = Rig()
    rig.add(6, version=1)
    rig.add(6, version=2)
    rig.add(6, version=1)
    rig.add(6)
    plan = rig.step()
    assert [(copy.version, copy.slot) for copy in plan.copies] == [(1, 1), (2, 2)]
    assert [start.slot for start in plan.starts] == [0], "the base model waits for nobody"
    assert [start.slot for start in rig.step().starts] == [1, 2, 1]
    rig.run()
    rig.add(6, version=3)
    plan = rig.step()
    assert (plan.freed_slots, [copy.version for copy in plan.copies]) == ([2], [3])
    assert [start.slot for start in rig.step().starts] == [2]


def test_a_copy_takes_any_number_of_steps() -> None:
    rig = Rig(copy_steps=4)
    slow = rig.add(6, version=1)
    base = rig.add(6, max_new=3)
    assert len(rig.step().copies) == 1
    for _ in range(2):
        plan = rig.step()
        assert ([row.seq for row in plan.rows], plan.starts, plan.copies) == ([base.id], [], [])
        assert rig.scheduler.has_copies_in_flight
    assert rig.end_of(base).kind == "length"
    plan = rig.step()
    assert (plan.ended, plan.is_empty) == ([base.id], True), "the worker waits for the copy"
    assert [start.seq for start in rig.step().starts] == [slow.id]
    assert not rig.scheduler.has_copies_in_flight


def test_steps_go_on_while_a_copy_is_on_its_way() -> None:
    rig = Rig()
    seq = rig.add(6, version=1)
    plan = rig.plan()
    assert [copy.version for copy in plan.copies] == [1]
    assert rig.scheduler.plan() is None, "the step in flight is to be committed first"
    rig.scheduler.commit(plan, StepResult(step=plan.step))
    rig.scheduler.abort(seq.id, ABORT)
    rig.collect()
    assert (rig.scheduler.num_waiting, rig.scheduler.has_work) == (0, True)
    for _ in range(2):
        plan = rig.plan()
        assert plan == StepPlan(step=plan.step)
        rig.scheduler.commit(plan, StepResult(step=plan.step))
    plan = rig.plan()
    rig.scheduler.commit(plan, StepResult(step=plan.step, copied=[1]))
    assert rig.residency.tier(1) is Tier.DEVICE
    assert not rig.scheduler.has_work


def test_the_next_adapters_in_line_are_copied_ahead() -> None:
    rig = Rig(max_loras=1, num_slots=4)
    for version in (1, 2, 3, 4):
        rig.add(6, version=version, max_new=20)
    assert [copy.version for copy in rig.step().copies] == [1, 2], "two at a time, the rest later"
    plan = rig.step()
    assert ([start.slot for start in plan.starts], [c.version for c in plan.copies]) == ([1], [3])
    assert rig.step().copies == [], "4 has no room that is not wanted before"


def test_a_sequence_waits_for_the_read_of_its_adapter() -> None:
    rig = Rig(max_host=2, max_loras=1)
    assert rig.residency.host.take_drops() == [1, 2, 3]
    seq, other = rig.add(6, version=1), rig.add(6, version=5)
    plan = rig.step()
    assert rig.residency.take_reads() == [1]
    assert [copy.version for copy in plan.copies] == [5], "others pass"
    assert rig.residency.host.take_drops() == [4]
    rig.run()
    assert rig.end_of(other).kind == "length"
    assert not rig.scheduler.has_work, "nothing can be done before it is read"
    assert rig.residency.read_done(1, [0, 0])
    assert rig.scheduler.has_work
    rig.run()
    assert rig.end_of(seq).kind == "length"


def test_a_failed_read_ends_its_sequences_only() -> None:
    rig = Rig(max_host=2, max_loras=1)
    lost = [rig.add(6, version=1), rig.add(6, version=1)]
    other = rig.add(6, version=5)
    rig.step()
    assert rig.residency.take_reads() == [1]
    rig.residency.read_failed(1, "w.safetensors has vanished")
    rig.run()
    for seq in lost:
        assert rig.end_of(seq) == FinishReason(
            kind="abort",
            failure=Failure(
                "refused", "the adapter could not be read again: w.safetensors has vanished"
            ),
        )
    assert rig.end_of(other).kind == "length"
    with pytest.raises(RequestError, match="has vanished"):
        rig.add(6, version=1)
    rig.residency.add(1, [0, 0])
    again = rig.add(6, version=1)
    rig.run()
    assert rig.end_of(again).kind == "length"


def test_failing_a_version_ends_what_waits_and_what_runs() -> None:
    rig = Rig(max_running=1)
    running, waiting, other = rig.add(6, version=1), rig.add(6, version=1), rig.add(6)
    rig.step()
    rig.step()
    rig.scheduler.fail_version(1, Failure("failed", "gone"))
    rig.collect()
    for seq in (running, waiting):
        assert rig.end_of(seq) == FinishReason(kind="abort", failure=Failure("failed", "gone"))
    rig.run()
    assert rig.end_of(other).kind == "length"
    assert rig.residency.num_uses(1) == 0


def test_plans_are_committed_in_order_with_their_own_result() -> None:
    rig = Rig()
    rig.add(6)
    plan = rig.plan()
    with pytest.raises(ValueError, match="does not fit the plan"):
        rig.scheduler.commit(plan, StepResult(step=plan.step))
    token = SampledToken(seq=0, token_id=1)
    with pytest.raises(ValueError, match="does not fit the plan"):
        rig.scheduler.commit(plan, StepResult(step=plan.step + 1, tokens=[token]))
    later = rig.plan()
    with pytest.raises(ValueError, match="not the oldest"):
        rig.scheduler.commit(later, StepResult(step=later.step, tokens=[token]))


def test_misuse_of_add() -> None:
    rig = Rig()
    seq = rig.add(6)
    with pytest.raises(ValueError, match="added before"):
        rig.scheduler.add(seq)
    with pytest.raises(ValueError, match="version 9"):
        rig.add(6, version=9)


def test_logprobs_of_tokens_are_passed_on() -> None:
    rig = Rig()
    rig.add(6, max_new=1, return_logprob=True)
    plan = rig.plan()
    assert plan.starts[0].num_top_logprobs == 0
    logprobs = TokenLogprobs(-0.5, 8, [(-0.5, 8)])
    token = SampledToken(seq=0, token_id=8, logprobs=logprobs)
    rig.scheduler.commit(plan, StepResult(step=plan.step, tokens=[token]))
    assert [output.logprobs for output in rig.scheduler.drain()] == [[logprobs]]
