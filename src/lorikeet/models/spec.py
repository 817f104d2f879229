"""What a base model is, read from its Hugging Face config. No torch here.

:class:`ModelSpec` holds everything that decides shapes and arithmetic. :func:`read_model_spec` refuses whatever it
does not implement, so a spec that exists can be served exactly.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikeet.core.request import SamplingParams
from lorikeet.core.rope import RopeSpec
from lorikeet.core.sites import LoRASite, SiteKind, SiteSlice
from lorikeet.errors import ModelError, RequestError
from lorikeet.fields import is_integer
from lorikeet.models.families import FAMILIES, Family, FixedOrConfig
from lorikeet.models.rope_config import read_rope
from lorikeet.models.source import locate_model

_DTYPES = ("float32", "bfloat16", "float16")
# Fields that change the arithmetic or the format of the weights in ways that no family here implements: name -> the
# values that leave it off.
_REFUSED: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "per_layer_config": (None,),
    "hidden_act": ("silu", "swish"),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
}

_GENERATION_FILE = "generation_config.json"
# Fields of generation_config.json that become defaults of SamplingParams, under the same names.
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A base model's shapes and flags.

    Attributes:
        sliding_windows: by layer: a token attends to this many newest positions, itself included; None means all.
        qk_norm: RMSNorm over each head of queries and keys.
        max_position_embeddings: as the config says; see :attr:`max_context_length` for what can be served.
        dtype: the checkpoint's own (``float32``, ``bfloat16`` or ``float16``).
        eos_token_ids: as generation uses them: from generation_config.json, else from config.json.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeSpec
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def max_context_length(self) -> int:
        """Longest sequence that the positions are made for, in tokens.

        Linear scaling stretches the config's length by its factor, YaRN the original length by its own. Dynamic
        scaling has no length of its own: beyond ``max_position_embeddings`` every key depends on the length of the
        sequence it was computed for, so it is served up to there, where it equals unscaled RoPE.
        """
        rope = self.rope
        if rope.kind == "linear":
            return int(self.max_position_embeddings * rope.factor)
        if rope.kind == "yarn":
            return max(self.max_position_embeddings, int(rope.original_max_position * rope.factor))
        return self.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; tied ones count once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = self.q_size + 2 * self.kv_size
        layer = hidden * (qkv + self.q_size + 3 * inner) + 2 * hidden
        layer += qkv * self.qkv_bias + hidden * self.o_bias + (2 * inner + hidden) * self.mlp_bias
        layer += 2 * self.head_dim * self.qk_norm
        tables = 1 if self.tie_word_embeddings else 2
        return tables * self.vocab_size * hidden + self.num_layers * layer + hidden

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of K and V over all layers, for elements of ``dtype_bytes``."""
        return 2 * self.num_layers * self.kv_size * dtype_bytes

    @property
    def lora_sites(self) -> tuple[LoRASite, ...]:
        """Where LoRA may enter: embed_tokens; by layer qkv, o, gate_up, down; lm_head."""
        hidden, vocab = self.hidden_size, self.vocab_size
        sites = [
            _site("embed_tokens", "embedding", None, vocab, "model", (("embed_tokens", hidden),))
        ]
        for layer in range(self.num_layers):
            sites.extend(self._layer_sites(layer))
        # The LM head stands beside "model", not in it.
        sites.append(_site("lm_head", "lm_head", None, hidden, "", (("lm_head", vocab),)))
        return tuple(sites)

    def _layer_sites(self, layer: int) -> tuple[LoRASite, ...]:
        hidden, inner = self.hidden_size, self.intermediate_size
        qkv = (("q_proj", self.q_size), ("k_proj", self.kv_size), ("v_proj", self.kv_size))
        gate_up = (("gate_proj", inner), ("up_proj", inner))
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        sites: tuple[tuple[str, SiteKind, int, str, tuple[tuple[str, int], ...]], ...] = (
            ("attention.qkv_proj", "column", hidden, attention, qkv),
            ("attention.o_proj", "row", self.q_size, attention, (("o_proj", hidden),)),
            ("mlp.gate_up_proj", "column", hidden, mlp, gate_up),
            ("mlp.down_proj", "row", inner, mlp, (("down_proj", hidden),)),
        )
        return tuple(
            _site(f"layers.{layer}.{path}", kind, layer, size, parent, parts)
            for path, kind, size, parent, parts in sites
        )


def _site(
    path: str,
    kind: SiteKind,
    layer: int | None,
    in_features: int,
    hf_parent: str,
    parts: tuple[tuple[str, int], ...],
) -> LoRASite:
    slices: list[SiteSlice] = []
    offset = 0
    for name, size in parts:
        slices.append(SiteSlice(name, f"{hf_parent}.{name}".removeprefix("."), offset, size))
        offset += size
    return LoRASite(path, kind, layer, in_features, tuple(slices))


def read_json(file: Path) -> dict[str, object]:
    """Parse a JSON file that holds one object.

    Raises:
        ModelError: it cannot be read or does not; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {type(value).__name__}, not a JSON object")
    return value


class ConfigReader:
    """Typed access to a config's fields; null counts as absent. Errors name the file, the field and its value."""

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.config = config
        self.where = where

    def size(self, name: str, default: int | None = None, *, allow_zero: bool = False) -> int:
        value = self.optional_size(name, None, allow_zero=allow_zero)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}: {name} is missing")
        return value

    def optional_size(
        self, name: str, absent: int | None, *, allow_zero: bool = False
    ) -> int | None:
        """A positive integer; ``absent`` if the field is not there, None if it is null."""
        value = self.config.get(name, absent)
        if value is None:
            return None
        if not is_integer(value) or value < (0 if allow_zero else 1):
            raise self._refuse(name, "a positive integer")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false")
        return value

    def token(self, name: str, default: int | None) -> int | None:
        value = self.config.get(name, default)
        if value is not None and not is_integer(value):
            raise self._refuse(name, "an integer or null")
        return value

    def _refuse(self, name: str, allowed: str) -> ModelError:
        return ModelError(f"{self.where}: {name} is {self.config[name]!r}; allowed: {allowed}")


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read ``config.json`` (and the end-of-sequence ids of ``generation_config.json``) of a model.

    Args:
        path: directory or hub id (see :func:`lorikeet.models.source.locate_model`).

    Raises:
        ModelError: no config, broken JSON, an unsupported architecture (the supported ones are listed), or a feature
            that is not implemented (named with its value).
    """
    directory = locate_model(path)
    file = directory / "config.json"
    if not file.is_file():
        raise ModelError(
            f"{directory} has no config.json; a Hugging Face model directory is needed"
        )
    return parse_model_config(read_json(file), _read_generation(directory), str(file))


def _read_generation(directory: Path) -> dict[str, object]:
    file = directory / _GENERATION_FILE
    return read_json(file) if file.is_file() else {}


def read_sampling_defaults(directory: Path, vocab_size: int) -> dict[str, float]:
    """Sampling parameters that ``generation_config.json`` recommends, by their names in :class:`SamplingParams`.

    Raises:
        ModelError: a value that no request could have; names the file, the field and what is allowed.
    """
    file = directory / _GENERATION_FILE
    given = _read_generation(directory)
    found: dict[str, Any] = {}
    for name in _SAMPLING_DEFAULTS:
        value = given.get(name)
        if value is None:
            continue
        if not _is_number(value, whole=name == "top_k"):
            allowed = "an integer" if name == "top_k" else "a number"
            raise ModelError(f"{file}: {name} is {value!r:.40}; allowed: {allowed} or null")
        # transformers writes 0 for no bound.
        found[name] = -1 if name == "top_k" and value == 0 else value
    try:
        SamplingParams(**found).validate(vocab_size)
    except RequestError as error:
        error.rename({})  # here they are fields of the file
        raise ModelError(
            f"{file}: {error}. With --sampling-defaults openai the file's values are not used"
        ) from error
    return found


def _is_number(value: object, *, whole: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return abs(value) < sys.float_info.max  # an integer may be larger than any float


def parse_model_config(
    config: Mapping[str, object], generation: Mapping[str, object], where: str
) -> ModelSpec:
    """A spec from the contents of config.json and generation_config.json.

    Args:
        where: names the config in messages.

    Raises:
        ModelError: as :func:`read_model_spec`.
    """
    family = _family(config, where)
    _refuse_unsupported(config, family, where)
    reader = ConfigReader(config, where)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    num_layers = reader.size("num_hidden_layers")
    max_position = reader.size("max_position_embeddings", family.max_position_embeddings)
    spec = ModelSpec(
        architecture=family.architecture,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=reader.optional_size("num_key_value_heads", family.num_kv_heads) or heads,
        head_dim=reader.optional_size("head_dim", family.head_dim) or hidden // heads,
        intermediate_size=reader.size("intermediate_size"),
        vocab_size=reader.size("vocab_size"),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        rope=read_rope(config, max_position, where),
        sliding_windows=_windows(reader, family, num_layers),
        qkv_bias=_bias(reader, family.qkv_bias, "attention_bias"),
        o_bias=_bias(reader, family.o_bias, "attention_bias"),
        mlp_bias=_bias(reader, family.mlp_bias, "mlp_bias"),
        qk_norm=family.qk_norm,
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=False),
        max_position_embeddings=max_position,
        dtype=_dtype(config, where),
        eos_token_ids=_eos(config, generation, family, where),
        bos_token_id=reader.token("bos_token_id", family.bos_token_id),
    )
    _check_heads(spec, explicit_head_dim=config.get("head_dim") is not None, where=where)
    return spec


def _family(config: Mapping[str, object], where: str) -> Family:
    supported = f"supported: {', '.join(FAMILIES)}"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ModelError(f"{where}: architectures is {architectures!r}, not one name; {supported}")
    family = FAMILIES.get(str(architectures[0]))
    if family is None:
        raise ModelError(f"{where}: architecture {architectures[0]} is not supported; {supported}")
    model_type = config.get("model_type", family.model_type)
    if model_type != family.model_type:
        raise ModelError(
            f"{where}: model_type {model_type!r} contradicts architecture {family.architecture}, which is "
            f"{family.model_type!r}"
        )
    return family


def _refuse_unsupported(config: Mapping[str, object], family: Family, where: str) -> None:
    for name, neutral in _REFUSED.items():
        if name in config and config[name] not in neutral:
            raise ModelError(f"{where}: {name} is {config[name]!r}, which is not supported")
    fixed = {"attention_bias": (family.qkv_bias, family.o_bias), "mlp_bias": (family.mlp_bias,)}
    for name, biases in fixed.items():
        if config.get(name) and not any(biases):
            raise ModelError(
                f"{where}: {name} is {config[name]!r}, but {family.architecture} has no such bias"
            )


def _bias(reader: ConfigReader, rule: FixedOrConfig, field: str) -> bool:
    return reader.flag(field, default=False) if rule == "config" else rule


def _windows(reader: ConfigReader, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Window by layer, as the family reads the config; contradictions are refused."""
    window = reader.optional_size("sliding_window", family.sliding_window)
    if family.window != "all" and not reader.flag(
        "use_sliding_window", default=family.window == "none"
    ):
        window = None
    if family.window == "none" and window is not None:
        raise ModelError(
            f"{reader.where}: sliding_window is {window}, but {family.architecture} has no sliding window"
        )
    sliding = [family.window == "all" and window is not None] * num_layers
    if family.window == "layers" and window is not None:
        first = reader.size("max_window_layers", 28, allow_zero=True)
        sliding = [layer >= first for layer in range(num_layers)]
    types = reader.config.get("layer_types")
    if types is not None:
        sliding = _read_layer_types(types, sliding, window, family, reader.where)
    return tuple(window if is_sliding else None for is_sliding in sliding)


def _read_layer_types(
    types: object, computed: list[bool], window: int | None, family: Family, where: str
) -> list[bool]:
    names = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or len(types) != len(computed) or not set(types) <= names.keys():
        raise ModelError(
            f"{where}: layer_types is {types!r}; allowed: a list of {len(computed)} of {', '.join(names)}"
        )
    sliding = [names[name] for name in types]
    if any(sliding) and window is None:
        raise ModelError(f"{where}: layer_types has sliding layers, but no sliding window is on")
    if family.window != "layers" and sliding != computed:
        raise ModelError(
            f"{where}: layer_types is {types!r}, but {family.architecture} attends in the same way in every layer"
        )
    return sliding


def _check_heads(spec: ModelSpec, *, explicit_head_dim: bool, where: str) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise ModelError(
            f"{where}: num_attention_heads {spec.num_heads} is no multiple of num_key_value_heads {spec.num_kv_heads}"
        )
    if not explicit_head_dim and spec.head_dim * spec.num_heads != spec.hidden_size:
        derived = FAMILIES[spec.architecture].head_dim is None
        if derived:
            raise ModelError(
                f"{where}: hidden_size {spec.hidden_size} is no multiple of num_attention_heads {spec.num_heads}, "
                "and head_dim is not given"
            )
    if spec.head_dim % 2:
        raise ModelError(
            f"{where}: head_dim {spec.head_dim} is odd; rotary embeddings need an even one"
        )


def _dtype(config: Mapping[str, object], where: str) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    text = str(name).removeprefix("torch.")
    if text not in _DTYPES:
        raise ModelError(
            f"{where}: dtype {name!r} is not supported; supported: {', '.join(_DTYPES)}"
        )
    return text


def _eos(
    config: Mapping[str, object], generation: Mapping[str, object], family: Family, where: str
) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id", family.eos_token_id)
    ids: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    tokens = tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool))
    if len(tokens) != len(ids):
        raise ModelError(
            f"{where}: eos_token_id is {value!r}; allowed: an integer, a list of them, or null"
        )
    return tokens
