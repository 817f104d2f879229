from __future__ import annotations

from tests.support.scheduler_rig import Rig


def test_stats() -> None:
    rig = Rig(max_running=2)
    rig.add(10, version=1, max_new=2)
    rig.add(10, max_new=3)
    rig.add(10, version=2)
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.running_versions, stats.waiting_versions) == ((), (1, 2)), "they were just copied"
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    assert (stats.num_running_adapters, stats.num_waiting_adapters) == (1, 1)
    assert (stats.running_versions, stats.waiting_versions) == ((1,), (2,))
    assert stats.num_waiting_for_adapter == 0, "2 was copied ahead and waits for a row"
    assert stats.total_adapter_device_evictions == 0
    assert (stats.num_pages, stats.num_used_pages, stats.num_cached_pages) == (32, 6, 0)
    assert stats.token_usage == 6 / 32
    rig.step()
    stats = rig.scheduler.stats()
    assert (stats.num_used_pages, stats.num_cached_pages) == (0, 5)
    assert (stats.total_prompt_tokens, stats.total_output_tokens) == (20, 5)
    assert (stats.total_cached_tokens, stats.total_finished, stats.total_preemptions) == (0, 2, 0)


def test_waiting_for_an_adapter() -> None:
    rig = Rig(copy_steps=1)
    rig.add(10, version=1)
    rig.add(10, version=1)
    rig.add(10, version=2)
    rig.add(10)
    assert rig.scheduler.stats().num_waiting_for_adapter == 3
    rig.step()
    assert rig.scheduler.stats().num_waiting_for_adapter == 3, "the copies are on their way"
    rig.step()
    assert rig.scheduler.stats().num_waiting_for_adapter == 0
    rig.run()
    rig.add(10, version=3)
    rig.run()
    assert rig.scheduler.stats().total_adapter_device_evictions == 1
