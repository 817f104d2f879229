"""The rotary embedding of a Hugging Face config, in its old and its new spelling. No torch here.

Old: ``rope_theta`` and ``rope_scaling`` (with ``type`` or ``rope_type``) beside the other fields. New (transformers 5):
one dict ``rope_parameters`` that holds theta and type too. Precedence is transformers' own (``modeling_rope_utils.py``,
``convert_rope_params_to_dict`` and ``standardize_rope_params``): ``rope_scaling`` before ``rope_parameters``, theta
inside the dict before theta outside of it, an ``original_max_position_embeddings`` outside before one inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from lorikeet.core.rope import ROPE_KINDS, RopeKind, RopeSpec
from lorikeet.errors import ModelError

_DEFAULT_THETA = 10_000.0
# Keys of each kind beyond those of every kind. transformers does not read the original length for linear and dynamic
# scaling (files of older releases carry it), nor "finetuned", so neither changes the result.
_EVERY_KIND = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"})
_ORIGINAL = "original_max_position_embeddings"
_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", _ORIGINAL}),
    "dynamic": frozenset({"factor", _ORIGINAL}),
    "llama3": frozenset({"factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "truncate"}
        | {"mscale", "mscale_all_dim"}
    ),
}
# transformers takes 0 for "not given" here.
_MAY_BE_ZERO = frozenset({"beta_fast", "beta_slow", "mscale", "mscale_all_dim"})
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


def read_rope(config: Mapping[str, object], max_position: int, where: str) -> RopeSpec:
    """The rotary embedding that transformers would build for ``config``.

    Args:
        max_position: the model's ``max_position_embeddings``.
        where: names the file in messages.

    Raises:
        ModelError: an unknown kind or key, a missing or impossible value, or a form that only other architectures have.
    """
    values = _merge(config, where)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ModelError(
            f"{where}: rope type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}"
        )
    known = cast(RopeKind, kind)
    _check_keys(values, known, where)
    theta = _number(values, "rope_theta", where)
    if known == "yarn":
        return _yarn(values, theta, max_position, where)
    numbers: dict[str, Any] = {name: _number(values, name, where) for name in _REQUIRED[known]}
    if known == "llama3":
        numbers["original_max_position"] = int(_number(values, _ORIGINAL, where, max_position))
    return RopeSpec(kind=known, theta=theta, **numbers)


def _merge(config: Mapping[str, object], where: str) -> dict[str, object]:
    """The rope dict with theta and the outer original length folded in; keys whose value is null are left out."""
    source = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(source, dict):
        raise ModelError(
            f"{where}: rope_scaling / rope_parameters is {source!r}; allowed: an object"
        )
    if nested := [key for key, value in source.items() if isinstance(value, dict)]:
        raise ModelError(
            f"{where}: rope parameters that differ by layer type ({', '.join(nested)}) are not supported"
        )
    values = {key: value for key, value in source.items() if value is not None}
    values.setdefault("rope_theta", config.get("rope_theta") or _DEFAULT_THETA)
    if (outer := config.get(_ORIGINAL)) is not None:
        values[_ORIGINAL] = outer
    if (partial := config.get("partial_rotary_factor")) is not None:
        values.setdefault("partial_rotary_factor", partial)
    return values


def _check_keys(values: Mapping[str, object], kind: str, where: str) -> None:
    allowed = _KEYS[kind] | _EVERY_KIND
    unknown = sorted(values.keys() - allowed - {_ORIGINAL})
    if unknown:
        raise ModelError(
            f"{where}: rope parameters {', '.join(unknown)} do not belong to rope type {kind!r}; "
            f"allowed: {', '.join(sorted(allowed))}"
        )
    if missing := [name for name in _REQUIRED[kind] if name not in values]:
        raise ModelError(f"{where}: rope type {kind!r} needs {', '.join(missing)}")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(
            f"{where}: partial_rotary_factor {values['partial_rotary_factor']} is not supported; allowed: 1.0"
        )


def _yarn(values: Mapping[str, object], theta: float, max_position: int, where: str) -> RopeSpec:
    original = int(_number(values, _ORIGINAL, where, max_position))
    factor = _number(values, "factor", where, max_position / original)
    return RopeSpec(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_position=original,
        beta_fast=_number(values, "beta_fast", where, 32.0) or 32.0,
        beta_slow=_number(values, "beta_slow", where, 1.0) or 1.0,
        truncate=bool(values.get("truncate", True)),
        attention_factor=_yarn_attention_factor(values, factor, where),
    )


def _yarn_attention_factor(values: Mapping[str, object], factor: float, where: str) -> float:
    """YaRN (arXiv 2309.00071, section 3.4): ``0.1 ln(factor) + 1`` unless given, or a quotient of two such."""
    if "attention_factor" in values:
        return _number(values, "attention_factor", where)
    mscale = _number(values, "mscale", where, 0.0)
    mscale_all_dim = _number(values, "mscale_all_dim", where, 0.0)
    if mscale and mscale_all_dim:
        return _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number(
    values: Mapping[str, object], name: str, where: str, default: float | None = None
) -> float:
    value = values.get(name, default)
    # bool is an int to Python, but a flag in a config is a mistake here.
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (value > 0 or (value == 0 and name in _MAY_BE_ZERO))
    ):
        return float(value)
    raise ModelError(f"{where}: rope parameter {name} is {value!r}; allowed: a number above 0")
