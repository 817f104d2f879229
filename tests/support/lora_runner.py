"""A decoder with adapters in a poisoned pool, fed token lists: everything between a plan and the logits but the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.rank_pages import RankPageAllocator
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.core.plan import PageCopy
from lorikeet.core.sites import LoRASite
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.base_weights import checkpoint_weight
from lorikeet.lora.batch_builder import LoRAPlan, TileBatchBuilder, make_batch_builder
from lorikeet.lora.build import attach_lora
from lorikeet.lora.device_pool import DevicePool
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.pool_plan import shard_site, site_rules
from lorikeet.models.build import build_model
from lorikeet.models.spec import read_model_spec
from lorikeet.ops.lora.metadata import LoRABatch
from lorikeet.ops.select import BackendName, make_backend
from lorikeet.parallel.group import SingleRank, TPGroup
from tests.support.paged import PagedRunner


def all_targets(sites: Sequence[LoRASite]) -> frozenset[str]:
    return frozenset(part.name for site in sites for part in site.slices)


def poison(pool: DevicePool) -> None:
    """Fill the pool's memory with NaN: whatever is read without having been copied in shows."""
    pool._pool_E.fill_(torch.nan)


def copy_in(pool: DevicePool, adapter: HostAdapter, copy: PageCopy) -> None:
    """A whole copy, at once."""
    pool.reserve(adapter, copy)
    pool.write(adapter, copy)
    pool.describe(adapter, copy)


def batch_of(plan: LoRAPlan | None) -> LoRABatch | None:
    """The batch of a plan, with its arrays copied by themselves."""
    return None if plan is None else plan.batch([torch.from_numpy(a) for a in plan.arrays])


class AdapterPool:
    """A pool with an allocator beside it, and adapters by name."""

    def __init__(
        self,
        sites: Sequence[LoRASite],
        layout: PoolLayout,
        dtype: torch.dtype = torch.float32,
        *,
        rank: int = 0,
    ) -> None:
        self.layout = layout
        self.pool = DevicePool(sites, layout, dtype, torch.device("cpu"), rank=rank)
        poison(self.pool)
        self.allocator = RankPageAllocator(
            layout.class_elems, layout.slab_elems, layout.num_slabs, layout.reserved_slabs
        )
        self.slots: dict[str | None, int] = {None: 0}
        self._pages: dict[str, list[int]] = {}

    def add(self, name: str, adapter: HostAdapter) -> int:
        """Make an adapter resident; returns its slot."""
        pages = self.allocator.alloc(adapter.page_classes)
        assert pages is not None, f"no room for {name}"
        slot = next(n for n in range(1, self.pool.num_slots) if n not in self.slots.values())
        copy_in(self.pool, adapter, PageCopy(version=slot, slot=slot, page_ids=pages))
        self.slots[name], self._pages[name] = slot, pages
        return slot

    def evict(self, name: str) -> None:
        self.pool.clear_slot(self.slots.pop(name))
        self.allocator.free(self._pages.pop(name))


class LoRARunner:
    """Runs batches in which each sequence has its own adapter.

    Args:
        adapters: name -> directory; all are resident from the start.
        tp: this runner's place in a tensor-parallel group.
        backend: of LoRA.
    """

    def __init__(
        self,
        model_dir: Path,
        adapters: Mapping[str, Path],
        *,
        max_rank: int = 64,
        max_loras_per_batch: int | None = None,
        dtype: torch.dtype = torch.float32,
        tp: TPGroup | None = None,
        backend: BackendName = "torch",
    ) -> None:
        tp = tp or SingleRank()
        spec = read_model_spec(model_dir)
        self.model = build_model(
            model_dir,
            spec,
            dtype=dtype,
            device="cpu",
            load_format="auto",
            tp=tp,
            attention=SDPABackend(),
            progress=False,
        )
        self._sites, self._dtype, self._model_dir = spec.lora_sites, dtype, model_dir
        self._rules = site_rules(self.model, self._sites)
        local = [
            shard_site(site, rule) for site, rule in zip(self._sites, self._rules, strict=True)
        ]
        layout = PoolLayout.make(
            local,
            all_targets(local),
            max_rank=max_rank,
            max_loras_per_batch=max_loras_per_batch or max(1, len(adapters)),
            element_size=dtype.itemsize,
        )
        self.adapters = AdapterPool(local, layout, dtype, rank=tp.rank)
        pool = self.adapters.pool
        attach_lora(
            self.model,
            self._sites,
            pool,
            make_backend(backend, pool.page_table, page_ranks=layout.page_ranks),
        )
        self._builder = make_batch_builder(backend, pool, torch.device("cpu"))
        self._paged = PagedRunner(
            self.model, num_kv_heads=max(1, spec.num_kv_heads // tp.size), num_pages=256
        )
        for name, directory in adapters.items():
            self.adapters.add(name, self.load(name, directory))

    def load(self, name: str, directory: Path) -> HostAdapter:
        return load_adapter(
            name,
            directory,
            self._sites,
            self.adapters.layout,
            self._dtype,
            base_weight=checkpoint_weight(self._model_dir),
            rules=self._rules,
        )

    def lora(
        self,
        slots: Sequence[int],
        lengths: Sequence[int],
        rows: Sequence[int],
        *,
        beside: bool = False,
    ) -> LoRABatch | None:
        """Which rows use which adapter; ``beside`` as for a captured step of one token per row."""
        if not beside:
            return batch_of(self._builder.plan(slots, lengths, rows))
        if not isinstance(self._builder, TileBatchBuilder):
            batch = batch_of(self._builder.plan(slots, lengths, rows))
            return batch and dataclasses.replace(batch, is_beside=True)
        assert list(lengths) == [1] * len(slots)
        return batch_of(self._builder.plan_decode(slots, len(slots)))

    def step(
        self,
        parts: Mapping[int, Sequence[int]],
        adapter_of: Mapping[int, str | None],
        rows: Sequence[int] | None = None,
        *,
        beside: bool = False,
    ) -> torch.Tensor:
        """Append tokens to sequences in one batch; logits of all new tokens, or of ``rows``."""
        batch = self._paged.batch(parts, rows=rows)
        lora = self.lora(
            [self.adapters.slots[adapter_of.get(seq)] for seq in parts],
            [len(tokens) for tokens in parts.values()],
            batch.logits_rows_N.tolist(),
            beside=beside,
        )
        with torch.inference_mode():
            return self.model(dataclasses.replace(batch, lora=lora))
