"""The cache of downloads between processes: one writer, bounded, nothing in use is removed, no lock is left behind."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import time

import pytest

from lorikeet.adapters.sources.disk_cache import DiskCache, FileInfo
from lorikeet.errors import AdapterError


def put(cache, key, size, *, validator="v"):
    """What a download does."""
    files = {"f": FileInfo(size, validator)}
    with cache.hold(key) as (entry, lock):
        if entry.files() != files:
            entry.start("url", files)
            (entry.partial / "f").write_bytes(b"x" * size)
            entry.publish()
        lock.share()
        return entry.path


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "cache", 1000)


def names(cache):
    return {path.name for path in cache.directory.iterdir()}


def test_an_entry_is_there_or_not(cache):
    files = {"f": FileInfo(10, "v")}
    with cache.hold("k") as (entry, _):
        entry.start("url", files)
        assert entry.files() is None
        (entry.partial / "f").write_bytes(b"x" * 10)
        entry.publish()
        assert entry.files() == files
    assert names(cache) == {"k", "k.lock", "all.lock"}
    assert cache.directory.stat().st_mode & 0o077 == 0


def test_a_failed_start_leaves_nothing(cache):
    with cache.hold("k") as (entry, _), pytest.raises(AdapterError, match="lora-disk-cache-gb"):
        entry.start("url", {"f": FileInfo(1001, "v")})
    assert names(cache) == {"all.lock"}


def test_eviction_removes_the_lock_too(cache):
    put(cache, "a", 600)
    put(cache, "b", 600)
    assert names(cache) == {"b", "b.lock", "all.lock"}


def test_the_rest_of_a_cut_download_is_kept_and_counts(cache):
    with cache.hold("a") as (entry, _):
        entry.start("url", {"f": FileInfo(600, "v")})
        (entry.partial / "f").write_bytes(b"x")
    put(cache, "b", 300)
    with cache.hold("a") as (entry, _):
        entry.start("url", {"f": FileInfo(600, "v")})
        assert (entry.partial / "f").read_bytes() == b"x"
        entry.start("url", {"f": FileInfo(600, "w")})
        assert not (entry.partial / "f").exists()
    put(cache, "c", 700)
    assert names(cache) == {"c", "c.lock", "all.lock"}


def test_a_download_announces_its_room(cache):
    with cache.hold("a") as (entry, _):
        entry.start("url", {"f": FileInfo(600, "v")})
        with pytest.raises(AdapterError, match="do not fit"):
            put(cache, "b", 600)


def test_a_lock_that_was_removed_while_somebody_waited(cache):
    put(cache, "a", 600)
    found = []
    with cache.hold("a") as (entry, lock):
        thread = threading.Thread(target=lambda: found.append(put(cache, "a", 600)))
        thread.start()
        time.sleep(0.05)
        lock.remove()
        assert not lock.is_current()
    thread.join()
    assert found == [entry.path]
    assert "a.lock" in names(cache)


def _worker(directory, seed, failures):
    cache = DiskCache(directory, 1000)
    rng = random.Random(seed)
    for _ in range(60):
        key, size = rng.choice(["a", "b", "c", "d", "e"]), 300
        files = {"f": FileInfo(size, "v")}
        try:
            with cache.hold(key) as (entry, lock):
                if entry.files() != files:
                    entry.start("url", files)
                    (entry.partial / "f").write_bytes(key.encode() * size)
                    entry.publish()
                lock.share()
                if not lock.is_current() or entry.files() is None:
                    continue
                time.sleep(rng.random() * 0.002)
                if (entry.path / "f").read_bytes() != key.encode() * size:
                    failures.put("mixed")
        except AdapterError as error:
            if "do not fit" not in str(error):
                failures.put(str(error))
        except OSError as error:
            failures.put(repr(error))


def test_four_processes(tmp_path):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    processes = [
        context.Process(target=_worker, args=(tmp_path, seed, failures)) for seed in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert failures.empty()
    present = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert sum((path / "f").stat().st_size for path in present) <= 1000
    assert len(os.listdir(tmp_path)) == 2 * len(present) + 1
