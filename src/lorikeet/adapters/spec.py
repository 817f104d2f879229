"""``adapter_config.json`` -> :class:`LoRASpec`; whatever is not implemented is refused by name.

A field falls in one of three groups:

- it is in ``LoRASpec``: its type and range are checked;
- it cannot change what a trained adapter computes (``_HARMLESS``): any value is taken;
- it is anything else, known to PEFT or not: only a value that says "off" (null, false or empty) is taken.

The semantics are those of PEFT's ``LoraConfig``; PEFT is the authority and the oracle of the tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

from lorikeet.adapters.files import read_small
from lorikeet.errors import AdapterError
from lorikeet.fields import is_integer
from lorikeet.masking import printable, shortened

CONFIG_FILE = "adapter_config.json"
# Thousands of full module paths and patterns fit. JSON is read with the interpreter's lock held.
MAX_CONFIG_BYTES = 1 << 20
# Entries of rank_pattern, alpha_pattern and layers_pattern together: more than any model here has modules.
MAX_PATTERNS = 8192
# Larger than any layer is wide.
_MAX_RANK = 1 << 20
_RANKS = f"an integer from 1 to {_MAX_RANK}"
ALL_LINEAR = "all-linear"

# Largest float32; scales are computed in float32.
_LARGEST = 3.4028234663852886e38

T = TypeVar("T")

# What the adapter was made from and how it was trained. None of these reaches the forward pass of a trained adapter:
# fan_in_fan_out only describes the base's weight, and PEFT forces it to False for the nn.Linear of our models.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# Initialisations that leave the base model alone. Others (pissa, olora, corda, loftq, lora_ga) subtract from its weights,
# so that the adapter is right only beside weights that we do not have.
_PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

_HINTS = {
    "alora_invocation_tokens": "activated LoRA",
    "ensure_weight_tying": "tied adapters",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "added tokens",
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRASpec:
    """The fields of an adapter's configuration that decide what it computes; meanings are PEFT's.

    Attributes:
        target_modules: names or path suffixes; a string is ``all-linear`` or a regular expression over whole paths.
        exclude_modules: the same, without ``all-linear``; wins over ``target_modules``.
        layers_to_transform: layer indices; None means every layer.
        layers_pattern: names of the list of layers; empty means any.
        rank_pattern: regular expression over the end of a path -> rank; the first match counts.
        alpha_pattern: the same for lora_alpha.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    use_rslora: bool = False
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])

    def scale(self, rank: int, alpha: float) -> float:
        """Factor of B A x for a module of this rank and alpha."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_adapter_config(directory: str | Path) -> LoRASpec:
    """Read and check ``adapter_config.json`` of an adapter's directory.

    Raises:
        AdapterError: the file is missing, is not JSON, or asks for what is not implemented.
    """
    path = Path(directory) / CONFIG_FILE
    return parse_config_bytes(read_small(path, MAX_CONFIG_BYTES), str(path))


def parse_config_bytes(text: bytes, where: str) -> LoRASpec:
    """Check the bytes of an ``adapter_config.json``.

    Args:
        where: named in front of each error.

    Raises:
        AdapterError: they are not JSON, or ask for what is not implemented.
    """
    try:
        data: object = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{where} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{where} holds a JSON {type(data).__name__}, not an object")
    return parse_adapter_config(cast("dict[str, object]", data), where)


def parse_adapter_config(data: Mapping[str, object], where: str) -> LoRASpec:
    """Check the fields of an adapter's configuration.

    Args:
        where: named in front of each error.

    Raises:
        AdapterError: names the field, its value and what is allowed.
    """
    reader = _Reader(data, where)
    reader.check_text()
    if data.get("peft_type") != "LORA":
        raise reader.refuse("peft_type", '"LORA"')
    reader.check_bias()
    reader.check_init()
    spec = LoRASpec(
        r=reader.take("r", _rank, 8, _RANKS),
        lora_alpha=reader.take("lora_alpha", _number, 8.0, "a finite number"),
        use_rslora=reader.take("use_rslora", _boolean_or_none, None, "true or false"),
        target_modules=reader.take(
            "target_modules", _modules, None, "a list of names, a pattern, or all-linear"
        ),
        exclude_modules=reader.take(
            "exclude_modules", _modules_or_none, (), "null, a list of names, or a pattern"
        ),
        layers_to_transform=reader.take(
            "layers_to_transform", _layers, None, "null, an integer or a list of integers"
        ),
        layers_pattern=reader.take(
            "layers_pattern", _strings_or_none, (), "null, a name or a list of names"
        ),
        rank_pattern=reader.take(
            "rank_pattern", _pattern_of(_rank), {}, f"an object, name to {_RANKS}"
        ),
        alpha_pattern=reader.take(
            "alpha_pattern", _pattern_of(_number), {}, "an object of finite numbers"
        ),
    )
    reader.check_rest()
    _check_combination(spec, reader)
    _check_patterns(spec, reader)
    return spec


class _Reader:
    """Takes fields out of a configuration and remembers which are left."""

    def __init__(self, data: Mapping[str, object], where: str) -> None:
        self._data = data
        self._where = where
        self._taken = {"peft_type", "bias", "init_lora_weights"}

    def take(self, name: str, parse: Callable[[object], T], default: T | None, allowed: str) -> T:
        """Value of a field; ``default`` stands in for one that is not there (None: the field is required)."""
        self._taken.add(name)
        if name not in self._data and default is not None:
            return default
        try:
            return parse(self._data.get(name))
        except ValueError:
            raise self.refuse(name, allowed) from None

    def refuse(self, name: str, allowed: str) -> AdapterError:
        value = _show(self._data[name]) if name in self._data else "missing"
        return AdapterError(f"{self._where}: {name} is {value}; allowed: {allowed}")

    def check_text(self) -> None:
        """Refuse halves of surrogate pairs, which JSON can write and nothing can store or send."""
        for name, value in self._data.items():
            try:
                f"{name}{json.dumps(value, ensure_ascii=False)}".encode()
            except UnicodeEncodeError:
                raise self.fail(
                    f"{shortened(name)} holds half of a surrogate pair, which is no text"
                ) from None
            except (TypeError, ValueError, RecursionError) as error:
                raise self.fail(
                    f"{shortened(name)} cannot be read: {printable(str(error))}"
                ) from None

    def check_bias(self) -> None:
        if self._data.get("bias", "none") != "none":
            raise self.refuse("bias", '"none" (trained biases are not implemented)')

    def check_init(self) -> None:
        init = self._data.get("init_lora_weights", True)
        if isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS):
            return
        raise self.refuse(
            "init_lora_weights",
            f"true, false, {', '.join(sorted(_PLAIN_INITS))}; others change the base model's weights "
            "(PEFT can convert such an adapter to plain LoRA when it saves it)",
        )

    def check_rest(self) -> None:
        """Refuse every other field unless its value says that the feature is off."""
        for name, value in self._data.items():
            if name in self._taken or name in _HARMLESS:
                continue
            if value is None or value is False or value in ("", [], {}):
                continue
            hint = f" ({_HINTS[name]})" if name in _HINTS else ""
            raise AdapterError(
                f"{self._where}: {shortened(name)}{hint} is {_show(value)}; it is not implemented, "
                "so the adapter cannot be served exactly"
            )

    def fail(self, message: str) -> AdapterError:
        return AdapterError(f"{self._where}: {message}")


def _check_combination(spec: LoRASpec, reader: _Reader) -> None:
    """Combinations that PEFT refuses when it builds a ``LoraConfig``."""
    if isinstance(spec.target_modules, str):
        if spec.layers_to_transform is not None:
            raise reader.fail("layers_to_transform needs target_modules to be a list, not a string")
        if spec.layers_pattern:
            raise reader.fail("layers_pattern needs target_modules to be a list, not a string")
    if spec.layers_pattern and spec.layers_to_transform is None:
        raise reader.fail("layers_pattern needs layers_to_transform")


def _check_patterns(spec: LoRASpec, reader: _Reader) -> None:
    num_patterns = len(spec.rank_pattern) + len(spec.alpha_pattern) + len(spec.layers_pattern)
    if num_patterns > MAX_PATTERNS:
        raise reader.fail(
            f"rank_pattern, alpha_pattern and layers_pattern have {num_patterns} entries; allowed: at most {MAX_PATTERNS}"
        )


def _rank(value: object) -> int:
    if not is_integer(value) or not 1 <= value <= _MAX_RANK:
        raise ValueError
    return value


def _number(value: object) -> float:
    # The bound also keeps integers out that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    if not abs(value) <= _LARGEST:
        raise ValueError
    return float(value)


def _boolean_or_none(value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError
    return bool(value)


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(item, str) and item for item in cast("list[object]", value)
    ):
        raise ValueError
    return tuple(cast("list[str]", value))


def _strings_or_none(value: object) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else _strings(value)


def _modules(value: object) -> tuple[str, ...] | str:
    if isinstance(value, str) and value:
        return value
    names = _strings(value)
    if not names:
        raise ValueError
    return names


def _modules_or_none(value: object) -> tuple[str, ...] | str:
    if value is None or value == "" or value == []:
        return ()
    return _modules(value)


def _layers(value: object) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    items = cast("list[object]", value) if isinstance(value, list) else [value]
    layers: list[int] = []
    for item in items:
        if not is_integer(item):
            raise ValueError
        layers.append(item)
    return tuple(layers)


def _pattern_of(parse: Callable[[object], T]) -> Callable[[object], dict[str, T]]:
    def parse_pattern(value: object) -> dict[str, T]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ValueError
        return {key: parse(item) for key, item in cast("dict[str, object]", value).items()}

    return parse_pattern


def _show(value: object) -> str:
    return shortened(json.dumps(value))
