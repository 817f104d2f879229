from __future__ import annotations

import pytest

from lorikeet.core.request import Request, SamplingParams
from lorikeet.core.sequence import Sequence, SequenceState
from lorikeet.scheduler.queue import RunningSet, WaitingQueue


def make(seq_id: int, version: int = 0, length_class: int = 0) -> Sequence:
    request = Request(prompt_token_ids=[1], sampling=SamplingParams())
    seq = Sequence(seq_id, request, version, seed=0)
    seq.length_class = length_class
    return seq


def filled(*versions: int) -> tuple[WaitingQueue, list[Sequence]]:
    queue = WaitingQueue()
    seqs = [make(index, version) for index, version in enumerate(versions)]
    for seq in seqs:
        queue.push(seq)
    return queue, seqs


def test_arrivals_count_everybody_and_serials_those_with_an_adapter() -> None:
    _, seqs = filled(0, 3, 0, 3, 4)
    assert [seq.arrival for seq in seqs] == [0, 1, 2, 3, 4]
    assert [seq.serial for seq in seqs] == [-1, 0, -1, 1, 2]


def test_heads_by_version() -> None:
    queue, seqs = filled(3, 4, 3, 0)
    assert (queue.head(3), queue.head(4), queue.head(0)) == (seqs[0], seqs[1], seqs[3])
    assert queue.head(9) is None
    assert list(queue.first(3, 5)) == [seqs[0], seqs[2]]
    assert list(queue.first(3, 1)) == [seqs[0]]
    assert list(queue.first(9, 1)) == []
    assert (len(queue), queue.num_versions, queue.versions(9)) == (4, 2, [3, 4])
    queue.remove(seqs[0])
    assert queue.versions(1) == [4]


def test_preempted_stand_in_front_in_their_old_order() -> None:
    queue, seqs = filled(3, 3, 4)
    old, young = make(10, 3), make(11, 3)
    queue.push_front(young)
    queue.push_front(old)
    assert list(queue.first(3, 9)) == [old, young, *seqs[:2]]
    assert queue.peek_idle(()) is old
    queue.check_integrity(())


def test_idle_heads_in_order() -> None:
    queue, seqs = filled(3, 4, 3, 5)
    assert queue.peek_idle(()) is seqs[0]
    assert queue.peek_idle({3}) is seqs[1]
    queue.remove(seqs[1])
    assert queue.peek_idle({3}) is seqs[3]
    queue.offer(3)
    assert queue.peek_idle(()) is seqs[0]
    queue.check_integrity(())


def test_a_head_that_is_set_aside_comes_back_when_it_is_offered() -> None:
    queue, seqs = filled(3, 4)
    queue.offer(3)
    assert queue.peek_idle(()) is seqs[0]
    assert queue.peek_idle((), {3}) is seqs[1], "offered twice, but off the list once and for all"
    assert queue.peek_idle((), {3, 4}) is None
    assert queue.peek_idle(()) is None
    queue.offer(3)
    assert queue.peek_idle(()) is seqs[0]


def test_the_base_model_is_never_among_the_idle_heads() -> None:
    queue, _ = filled(0, 0)
    assert queue.peek_idle(()) is None


def test_length_classes_are_lanes_of_their_own() -> None:
    queue = WaitingQueue()
    kinds = ((3, 2), (3, 0), (4, 1), (3, 0), (0, 1), (4, 0))
    seqs = [make(index, *kind) for index, kind in enumerate(kinds)]
    for seq in seqs:
        queue.push(seq)
    assert sorted(queue.length_classes) == [0, 1, 2]
    assert [queue.head(version, most=0) for version in (3, 4, 0)] == [seqs[1], seqs[5], None]
    assert list(queue.first(3, 2)) == seqs[:2]
    assert list(queue.first(3, 9, most=1)) == [seqs[1], seqs[3]]
    assert list(queue.first(3, 4)) == [seqs[0], seqs[1], seqs[3]]
    assert (queue.peek_idle(()), queue.peek_idle((), most=1)) == (seqs[0], seqs[1])
    assert queue.peek_idle((), {3}, most=0) is seqs[5]
    assert queue.peek_idle((), {3}) is seqs[2]
    queue.offer(3)
    queue.check_integrity(())
    queue.remove(seqs[0])
    assert (queue.versions(9), queue.head(3), list(queue.length_classes)) == (
        [3, 4],
        seqs[1],
        [0, 1],
    )
    queue.check_integrity(())


def test_integrity_check_finds_a_head_that_is_not_listed() -> None:
    queue, _ = filled(3)
    queue.peek_idle({3})
    queue.check_integrity({3})
    with pytest.raises(AssertionError, match="head of version 3 is not listed"):
        queue.check_integrity(())


def test_running_set_keeps_the_order_of_admission() -> None:
    running = RunningSet()
    seqs = [make(index, version) for index, version in enumerate((0, 3, 3))]
    for seq in seqs:
        running.add(seq)
    assert running.num_of_version == {3: 2}
    running.start_decoding(seqs[0])
    running.start_decoding(seqs[1])
    assert (running.youngest(), running.sequences(), len(running)) == (seqs[2], seqs, 3)
    assert (running.decoding(), running.first_prefilling()) == (seqs[:2], seqs[2])
    assert not running.remove(seqs[2])
    assert running.youngest() is seqs[1]
    assert running.remove(seqs[1])
    assert not running.remove(seqs[0])
    assert (len(running), running.num_of_version) == (0, {})
    assert seqs[0].state is SequenceState.DECODING
