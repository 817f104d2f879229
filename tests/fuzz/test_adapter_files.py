"""Adapters' configurations and headers of weights that somebody has spoilt: read, or refused with a reason."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lorikeet import demo
from lorikeet.adapters import patterns
from lorikeet.adapters.spec import LoRASpec, parse_adapter_config
from lorikeet.adapters.targets import resolve_targets
from lorikeet.adapters.tensor_header import TensorInfo, parse_header
from lorikeet.errors import AdapterError
from lorikeet.models.spec import read_model_spec
from tests.fuzz.conftest import Chance, check_reason

SITES = read_model_spec(demo.model_path()).lora_sites
ADAPTERS = demo.adapter_paths().values()
CONFIGS: list[dict[str, Any]] = [
    json.loads((path / "adapter_config.json").read_text()) for path in ADAPTERS
]
FILES = [(path / "adapter_model.safetensors").read_bytes() for path in ADAPTERS]

# Each of these takes a process and all the time that a pattern may have.
CRUEL = ["(([a-z._0-9]+)+)+X", "(.*)*" * 9 + "X", "a?" * 400 + "X"]
PATTERNS = [
    *(
        "(([a-z._0-9]+)+)+X",
        "(?:a|a)*b",
        "(?i)q_proj",
        "(",
        "a{99999999999}",
        "(?\ud800)",
        "(.*)*" * 9,
    ),
    *(
        "layers|x",
        ".*q_proj",
        "all-linear",
        "\\d",
        "(?<n>x)",
        "^$",
        "[",
        "(?=a)",
        "(a)\\1",
        "x" * 5000,
    ),
]
NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    10**59,
    10**400,
    -0.0,
    1e-320,
    3.4e38,
    float("inf"),
    float("nan"),
]
NAMES = ["q_proj", "", "\ud800", "a\nb", "model.layers.0.self_attn.q_proj", "\0", "é" * 300]


def draw_value(chance: random.Random, depth: int = 0) -> object:
    """Any JSON value, often one that was trouble once."""
    kind = chance.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return chance.choice(NUMBERS)
    if kind == 1:
        return chance.choice([None, True, False, "", [], {}])
    if kind == 2:
        return chance.choice(NAMES)
    if kind == 3:
        return chance.choice(CRUEL if chance.random() < 0.02 else PATTERNS)
    if kind == 4:
        return [draw_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    if kind == 5:
        values = [draw_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        return {chance.choice(NAMES + PATTERNS): value for value in values}
    return json.loads("[" * 30 + "]" * 30)


def spoilt_config(chance: random.Random) -> dict[str, Any]:
    config = dict(chance.choice(CONFIGS))
    for _ in range(chance.randint(1, 3)):
        action = chance.randrange(4)
        name = chance.choice(list(config) or ["r"])
        if action == 0:
            config.pop(name, None)
        elif action == 1:
            config[chance.choice(NAMES)] = draw_value(chance)
        elif action == 2:
            config[chance.choice(["rank_pattern", "alpha_pattern"])] = {
                chance.choice(PATTERNS): chance.choice(NUMBERS) for _ in range(3)
            }
        else:
            name = chance.choice([name, "target_modules", "exclude_modules", "layers_pattern"])
            config[name] = draw_value(chance)
    return config


def test_configurations(chances: Iterator[Chance], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MAX_SECONDS", 1)
    for chance in chances:
        config = spoilt_config(chance)
        try:
            spec = parse_adapter_config(config, "adapter_config.json")
            modules = resolve_targets(spec, SITES)
        except AdapterError as error:
            check_reason(error)
        else:
            assert isinstance(spec, LoRASpec)
            assert modules
            assert all(module.rank >= 1 for module in modules.values())


def spoilt_header(chance: random.Random) -> bytes:
    """A file of weights with something wrong in its header, or in the bytes of it."""
    data = bytearray(chance.choice(FILES)[:60_000])
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    action = chance.randrange(4)
    if action == 0:
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 8 + length))] = chance.randrange(256)
        return bytes(data)
    if action == 1:
        return bytes(data[: chance.randrange(len(data))])
    for _ in range(chance.randint(1, 3)):
        spoil(header, chance)
    text = json.dumps(header).encode()
    claimed = len(text) if action == 2 else chance.choice([0, 2**60, len(text) + 1, 16 << 20])
    return struct.pack("<Q", claimed) + text + bytes(data[8 + length :])


def spoil(header: dict[str, Any], chance: random.Random) -> None:
    name = chance.choice(list(header) or ["x"])
    entry: object = header.get(name)
    if chance.random() < 0.3 or not isinstance(entry, dict):
        header[chance.choice([name, *NAMES])] = draw_value(chance)
        return
    part = chance.choice(["dtype", "shape", "data_offsets"])
    sizes = [chance.choice([0, 1, 7, 2**31, 2**64 - 1, 10**59, -1, True, 1.5]) for _ in range(4)]
    entry[part] = chance.choice([sizes, sizes * 500, draw_value(chance), "F4", "F64"])


def test_headers(chances: Iterator[Chance]) -> None:
    for chance in chances:
        data = spoilt_header(chance)

        def read_at(start: int, length: int, data: bytes = data) -> bytes:
            assert 0 <= start <= start + length <= len(data)
            return data[start : start + length]

        try:
            tensors = parse_header(read_at, len(data), "weights")
        except AdapterError as error:
            check_reason(error)
        else:
            check_table(tensors, len(data))


def check_table(tensors: Mapping[str, TensorInfo], size: int) -> None:
    for info in tensors.values():
        assert 0 < info.start <= info.end <= size
        assert all(length >= 0 for length in info.shape)


def test_what_is_whole_is_read() -> None:
    """Else the fuzzers would see refusals alone."""
    for config in CONFIGS:
        assert resolve_targets(parse_adapter_config(config, "x"), SITES)
    for data in FILES:
        assert parse_header(lambda at, n, data=data: data[at : at + n], len(data), "x")
