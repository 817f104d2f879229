from __future__ import annotations

import pytest

from lorikeet.kv.manager import KVManager

TOKENS = list(range(50, 60))


def full(kv: KVManager, seq: int, tokens: list[int], version: int = 1) -> list[int]:
    """Admit, compute everything, finish. Returns the page table it had."""
    kv.admit(seq, version, tokens, len(tokens) - 1)
    pages = list(kv.page_table(seq))
    kv.release(seq, tokens, len(tokens))
    return pages


def test_admit_gives_pages_for_all_tokens() -> None:
    kv = KVManager(4, 8, radix=True)
    admitted = kv.admit(1, 0, TOKENS, 9)
    assert (admitted.num_cached, admitted.cached_pages, admitted.new_pages) == (0, [], [0, 1, 2])
    assert kv.sequences() == {1}
    kv.check_integrity()


def test_second_request_finds_the_full_pages_of_the_first() -> None:
    kv = KVManager(4, 8, radix=True)
    pages = full(kv, 1, TOKENS)
    assert (kv.num_free, kv.num_cached, kv.num_available) == (6, 2, 8)
    admitted = kv.admit(2, 1, [*TOKENS, 1, 2, 3], 12)
    assert (admitted.num_cached, admitted.cached_pages) == (8, pages[:2])
    assert kv.num_cached == 0, "in use now"
    kv.check_integrity()


def test_a_page_is_found_as_soon_as_it_is_committed() -> None:
    kv = KVManager(4, 8, radix=True)
    kv.admit(1, 1, TOKENS, 9)
    kv.commit(1, TOKENS, 7)
    assert kv.match(1, TOKENS, 9) == 4
    assert kv.admit(2, 1, TOKENS, 9).cached_pages == kv.page_table(1)[:1]
    kv.commit(1, TOKENS, 10)
    kv.check_integrity()
    assert kv.match(1, TOKENS, 9) == 8


def test_a_full_hit_leaves_the_last_token_to_compute() -> None:
    kv = KVManager(4, 8, radix=True)
    full(kv, 1, TOKENS[:8])
    admitted = kv.admit(2, 1, TOKENS[:8], 7)
    assert admitted.num_cached == 4
    kv.release(2, TOKENS[:8], 8)
    kv.check_integrity()
    assert (kv.num_free, kv.num_cached) == (6, 2), "the duplicate of the second page is free"


def test_without_radix_nothing_is_shared_or_kept() -> None:
    kv = KVManager(4, 8, radix=False)
    full(kv, 1, TOKENS)
    assert (kv.num_free, kv.num_cached) == (8, 0)
    assert kv.match(1, TOKENS, 9) == 0
    assert kv.admit(2, 1, TOKENS, 9).num_cached == 0
    kv.check_integrity()


def test_extend_adds_a_page_at_each_boundary() -> None:
    kv = KVManager(4, 4, radix=True)
    kv.admit(1, 0, TOKENS[:3], 2)
    assert kv.extend(1, 4) == []
    assert kv.extend(1, 5) == [1]
    assert kv.extend(1, 16) == [2, 3]
    assert kv.extend(1, 17) is None
    assert len(kv.page_table(1)) == 4
    kv.check_integrity()


def test_extend_evicts_what_is_cached() -> None:
    kv = KVManager(4, 4, radix=True)
    full(kv, 1, TOKENS)
    kv.admit(2, 0, TOKENS[:8], 7)
    assert kv.extend(2, 12) is not None
    assert (kv.num_free, kv.num_cached) == (0, 1)
    assert kv.match(1, TOKENS, 9) == 4, "the end of the prefix went first"
    kv.check_integrity()


def test_fits_does_not_count_the_match_as_free() -> None:
    kv = KVManager(4, 4, radix=True)
    full(kv, 1, TOKENS[:8])
    kv.admit(2, 0, TOKENS[:8], 7)
    # Two pages are cached and unlocked. A sequence that matches both needs a third one, and there is none.
    longer = [*TOKENS[:8], 1, 2]
    assert kv.num_available == 2
    assert not kv.fits(1, longer, 9, reserve=0)
    assert kv.fits(1, TOKENS[:8], 7, reserve=0)
    assert not kv.fits(1, TOKENS[:8], 7, reserve=1)
    with pytest.raises(ValueError, match="does not fit"):
        kv.admit(3, 1, longer, 9)
    kv.check_integrity()


def test_flush_is_refused_while_a_sequence_runs() -> None:
    kv = KVManager(4, 8, radix=True)
    full(kv, 1, TOKENS)
    kv.admit(2, 0, TOKENS, 9)
    assert not kv.flush()
    assert kv.num_cached == 2
    kv.release(2, TOKENS, 0)
    assert kv.flush()
    assert kv.num_free == 8
    kv.check_integrity()


def test_drop_version_under_a_running_sequence() -> None:
    kv = KVManager(4, 8, radix=True)
    full(kv, 1, TOKENS)
    longer = [*TOKENS, 1, 2, 3]
    kv.admit(2, 1, longer, 12)
    full(kv, 3, TOKENS, version=2)
    kv.drop_version(1)
    assert kv.match(1, TOKENS, 9) == 0
    assert kv.match(2, TOKENS, 9) == 8
    kv.check_integrity()
    # The sequence keeps its pages to its end, and nothing of it becomes findable any more.
    kv.commit(2, longer, 12)
    assert kv.extend(2, 17) is not None
    kv.check_integrity()
    kv.release(2, longer, 13)
    assert (kv.match(1, longer, 12), kv.num_available) == (0, 8)
    kv.check_integrity()


def test_a_sequence_is_admitted_once() -> None:
    kv = KVManager(4, 8, radix=True)
    kv.admit(1, 0, TOKENS, 9)
    with pytest.raises(ValueError, match="page table already"):
        kv.admit(1, 0, TOKENS, 9)


def test_changes_are_counted() -> None:
    kv = KVManager(4, 8, radix=True)
    kv.admit(1, 0, TOKENS, 9)
    before = kv.num_changes
    kv.commit(1, TOKENS, 3)
    assert kv.num_changes == before, "no page is full"
    kv.commit(1, TOKENS, 4)
    assert kv.num_changes > before
