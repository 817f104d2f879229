from __future__ import annotations

from tests.support.scheduler_rig import Rig


def test_stats() -> None:
    rig = Rig(max_running=2)
    rig.add(10, version=1, max_new=2)
    rig.add(10, max_new=2)
    rig.add(10, version=2)
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_running_adapters, stats.num_waiting_adapters) == (1, 1)
    assert (stats.num_pages, stats.num_used_pages, stats.num_cached_pages) == (32, 6, 0)
    assert stats.token_usage == 6 / 32
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.num_used_pages, stats.num_cached_pages) == (0, 4)
    assert (stats.total_prompt_tokens, stats.total_output_tokens) == (20, 4)
    assert (stats.total_cached_tokens, stats.total_finished, stats.total_preemptions) == (0, 2, 0)
