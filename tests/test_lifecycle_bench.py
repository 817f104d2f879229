"""The parts of ``benchmarks/lifecycle`` that can be wrong without a server."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.lifecycle.fixtures import (
    ALL_LINEAR,
    AdapterShape,
    ModelShape,
    write_adapters,
    write_model,
)
from benchmarks.lifecycle.measure import percentiles
from benchmarks.lifecycle.run import about, tables
from lorikeet.adapters.layout import PoolLayout
from lorikeet.lora.loader import load_adapter
from lorikeet.models.spec import read_model_spec


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL_LINEAR])
def test_its_adapters_fit_its_model(tmp_path, targets):
    shape = ModelShape(num_hidden_layers=2)
    write_model(tmp_path / "model", shape)
    sites = read_model_spec(tmp_path / "model").lora_sites
    layout = PoolLayout.make(
        sites, frozenset(targets), max_rank=4, max_loras_per_batch=1, element_size=4
    )
    paths = write_adapters(tmp_path / "adapters", 2, shape, AdapterShape(4, targets))
    first, second = (load_adapter("a", path, sites, layout, torch.float32) for path in paths)
    assert first.digest != second.digest
    assert len(first.modules) == 2 * len(targets)


def test_percentiles():
    assert percentiles([]) == {"n": 0}
    found = percentiles([n / 1000 for n in range(1, 201)])
    assert found == pytest.approx({"n": 200, "p50_ms": 100.5, "p99_ms": 199, "max_ms": 200})


def test_tables_and_result_file():
    times, none = percentiles([0.001]), percentiles([])
    beside = ("alone", "beside_requests", "beside_loads")
    results = {
        "cold_start": [
            {
                "registered": 10,
                "max_loaded_loras": 6,
                "load": times,
                "device": times,
                "host": times,
                "disk": none,
            }
        ],
        "live_adapters": [
            {
                "slots": 2,
                "live": 8,
                "tokens_per_second": 100.0,
                "requests_of_a_client": {"least": 3, "most": 4},
                "first_token": times,
                "between_tokens": times,
            }
        ],
        "load_pause": [
            {
                "slots": 2,
                "loads": 5,
                "load": times,
                **dict.fromkeys(beside, times),
                "longest_gap_to_step": dict.fromkeys(beside, 2.5),
            }
        ],
    }
    text = tables(results)
    assert "3 to 4" in text
    assert "1.0 / 1.0 / 1.0" in text
    assert json.loads(json.dumps({**about(), **results}))["hardware"]["cores"] > 0
