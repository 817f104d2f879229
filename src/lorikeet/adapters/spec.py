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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

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
    text = read_small(path, MAX_CONFIG_BYTES)
    try:
        data: object = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {printable(str(error))}") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a JSON {type(data).__name__}, not an object")
    return parse_adapter_config(cast("dict[str, object]", data), str(path))


def parse_adapter_config(data: Mapping[str, object], where: str) -> LoRASpec:
    """Check the fields of an adapter's configuration.

    Args:
        where: named in front of each error.

    Raises:
        AdapterError: names the field, its value and what is allowed.
    """
    _check_text(data, where)
    values: dict[str, Any] = {}
    for name, (parse, default, allowed) in _FIELDS.items():
        try:
            values[name] = parse(data.get(name, default))
        except ValueError:
            value = _show(data[name]) if name in data else "missing"
            raise AdapterError(f"{where}: {name} is {value}; allowed: {allowed}") from None
    _check_rest(data, where)
    spec = LoRASpec(**{field.name: values[field.name] for field in fields(LoRASpec)})
    _check_combination(spec, where)
    return spec


def _check_text(data: Mapping[str, object], where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can write and nothing can store or send."""
    for name, value in data.items():
        try:
            f"{name}{json.dumps(value, ensure_ascii=False)}".encode()
        except UnicodeEncodeError:
            reason = "holds half of a surrogate pair, which is no text"
        except (TypeError, ValueError, RecursionError) as error:
            reason = f"cannot be read: {printable(str(error))}"
        else:
            continue
        raise AdapterError(f"{where}: {shortened(name)} {reason}")


def _check_rest(data: Mapping[str, object], where: str) -> None:
    """Refuse every other field unless its value says that the feature is off."""
    for name, value in data.items():
        if name in _FIELDS or name in _HARMLESS:
            continue
        if value is None or value is False or value in ("", [], {}):
            continue
        hint = f" ({_HINTS[name]})" if name in _HINTS else ""
        raise AdapterError(
            f"{where}: {shortened(name)}{hint} is {_show(value)}; it is not implemented, "
            "so the adapter cannot be served exactly"
        )


def _check_combination(spec: LoRASpec, where: str) -> None:
    """Refuse combinations that PEFT refuses when it builds a ``LoraConfig``, and too many patterns."""
    is_text, has_layers = isinstance(spec.target_modules, str), spec.layers_to_transform is not None
    num_patterns = len(spec.rank_pattern) + len(spec.alpha_pattern) + len(spec.layers_pattern)
    for is_wrong, message in (
        (
            is_text and has_layers,
            "layers_to_transform needs target_modules to be a list, not a string",
        ),
        (
            is_text and spec.layers_pattern,
            "layers_pattern needs target_modules to be a list, not a string",
        ),
        (spec.layers_pattern and not has_layers, "layers_pattern needs layers_to_transform"),
        (
            num_patterns > MAX_PATTERNS,
            f"rank_pattern, alpha_pattern and layers_pattern have {num_patterns} entries; allowed: at most {MAX_PATTERNS}",
        ),
    ):
        if is_wrong:
            raise AdapterError(f"{where}: {message}")


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


def _only(word: str) -> Callable[[object], object]:
    def parse_word(value: object) -> object:
        if value != word:
            raise ValueError
        return value

    return parse_word


def _plain_init(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INITS):
        return value
    raise ValueError


# The fields of ``LoRASpec``, and those that must have a certain value: how each is read (ValueError: it is refused), what
# stands in for one that is not there, and what is allowed.
_FIELDS: dict[str, tuple[Callable[[object], object], object, str]] = {
    "peft_type": (_only("LORA"), None, '"LORA"'),
    "bias": (_only("none"), "none", '"none" (trained biases are not implemented)'),
    "init_lora_weights": (
        _plain_init,
        True,
        f"true, false, {', '.join(sorted(_PLAIN_INITS))}; others change the base model's weights "
        "(PEFT can convert such an adapter to plain LoRA when it saves it)",
    ),
    "r": (_rank, 8, _RANKS),
    "lora_alpha": (_number, 8.0, "a finite number"),
    "use_rslora": (_boolean_or_none, None, "true or false"),
    "target_modules": (_modules, None, "a list of names, a pattern, or all-linear"),
    "exclude_modules": (_modules_or_none, None, "null, a list of names, or a pattern"),
    "layers_to_transform": (_layers, None, "null, an integer or a list of integers"),
    "layers_pattern": (_strings_or_none, None, "null, a name or a list of names"),
    "rank_pattern": (_pattern_of(_rank), None, f"an object, name to {_RANKS}"),
    "alpha_pattern": (_pattern_of(_number), None, "an object of finite numbers"),
}


def _show(value: object) -> str:
    return shortened(json.dumps(value))
