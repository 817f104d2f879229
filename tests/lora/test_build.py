"""What each rank has of adapters: its own part of the bytes, and the same facts about them."""

from __future__ import annotations

from pathlib import Path

import torch

from lorikeet.adapters.limits import LoRALimits
from lorikeet.adapters.sources.source import SourceOptions
from lorikeet.attention.sdpa import SDPABackend
from lorikeet.core.adapters import AdapterFacts, Origin, ReadOrder
from lorikeet.lora.build import build_host_memory, build_pool
from lorikeet.lora.pool_plan import plan_pool
from lorikeet.models.build import build_model
from lorikeet.models.spec import read_model_spec
from lorikeet.parallel.group import SingleRank, TPGroup
from tests.support.peft_adapters import make_adapter
from tests.support.thread_ranks import run_ranks

CPU = torch.device("cpu")


def read(model_dir: Path, adapter: Path, tp: TPGroup) -> AdapterFacts:
    """What a rank tells of an adapter that it has read."""
    spec = read_model_spec(model_dir)
    model = build_model(
        model_dir,
        spec,
        dtype=torch.float32,
        device=CPU,
        load_format="auto",
        tp=tp,
        attention=SDPABackend(),
        progress=False,
    )
    limits = LoRALimits(8, frozenset({"q_proj", "o_proj", "down_proj"}))
    plan = plan_pool(model, spec.lora_sites, limits, max_loras_per_batch=2, dtype=torch.float32)
    pool = build_pool(model, plan, CPU, backend="torch", deterministic=False, rank=tp.rank)
    assert pool.nbytes == plan.layout.nbytes
    host = build_host_memory(plan, SourceOptions(), base_weight=None)
    host.read(1, ReadOrder(name="a", origins=(Origin(str(adapter), "operator"),)))
    host.pending()[0].result(60)
    ((_, facts),) = host.reads_done()
    assert isinstance(facts, AdapterFacts)
    host.keep(1, 1)
    host.close()
    assert host.get(1).nbytes == facts.nbytes
    return facts


def test_ranks_agree_on_an_adapter_and_hold_a_part_of_it_each(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path, targets=("q_proj", "o_proj", "down_proj"))
    whole = read(llama, adapter, SingleRank())
    first, second = run_ranks(2, lambda tp: read(llama, adapter, tp))
    assert first.digest == second.digest == whole.digest
    assert first.page_classes == second.page_classes
    assert len(first.page_classes) == len(whole.page_classes)
    assert (first.rank, first.targets) == (whole.rank, whole.targets)
    assert first.nbytes == second.nbytes
    assert whole.nbytes / 2 < first.nbytes < whole.nbytes
