"""What an adapter does to its base model, in numbers: which modules it changes, how strongly, and what it costs.

Shape legend: R rank (padded to whole pages), K input features, O output features of a module, C = K + O.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorikeet.core.sites import LoRASite
from lorikeet.lora.adapter import HostAdapter
from lorikeet.lora.base_weights import BaseWeight

# Below this squares of float32 lose digits.
_SMALLEST_SQUARE = 1e-30


@dataclass(frozen=True, slots=True)
class _Change:
    """What happens to one module.

    Attributes:
        kind: its name (``q_proj``).
        delta, base: Frobenius norms of scale B A and of the weight that it is added to (None: not known).
    """

    kind: str
    rank: int
    scale: float
    delta: float
    base: float | None


def adapter_report(
    adapter: HostAdapter, sites: Sequence[LoRASite], *, base_weight: BaseWeight | None = None
) -> dict[str, object]:
    """The effectiveness of an adapter, as JSON.

    Args:
        adapter: packed whole, not one rank's part of it.
        sites: those that the adapter was loaded for.
        base_weight: the base model's weights by name; every changed module's weight is read. Without it the change
            is relative to nothing.

    Returns:
        ``rank`` (largest), ``targets``, ``bytes``, and for the whole adapter as for each kind of module (in ``kinds``,
        by name): ``modules`` (``hit``: the change is not zero; ``targeted``: the configuration matches it;
        ``in_model``: the model has so many of these names), ``scale`` [least, largest effective factor of B A],
        ``delta_norm`` (Frobenius norm of scale B A, over all modules of the kind), ``relative_norm`` (that, divided by
        the norm of the base's weights of the same modules; None if one of them is not known).
    """
    changes = _changes(adapter, sites, base_weight)
    in_model = Counter(part.name for site in sites for part in site.slices)
    kinds = {name: [c for c in changes if c.kind == name] for name in adapter.targets}
    return {
        **_summary(changes, sum(in_model[name] for name in kinds)),
        "rank": adapter.rank,
        "targets": list(adapter.targets),
        "bytes": adapter.nbytes,
        "kinds": {name: _summary(some, in_model[name]) for name, some in kinds.items()},
    }


def _changes(
    adapter: HostAdapter, sites: Sequence[LoRASite], base_weight: BaseWeight | None
) -> list[_Change]:
    changes: list[_Change] = []
    begin = 0
    for module in adapter.modules:
        site = sites[module.site]
        part = site.slices[module.part]
        # Modules lie in the order of their pages.
        end = begin + adapter.page_sizes[module.first_page] * module.num_pages
        rows_RC = adapter.data[begin:end].view(-1, site.in_features + part.out_features)
        A_RK, B_RO = rows_RC.split((site.in_features, part.out_features), dim=1)
        begin = end
        delta = abs(module.scale) * product_norm(A_RK, B_RO)
        weight = base_weight(f"{part.hf_path}.weight") if base_weight else None
        base = None if weight is None else float(torch.linalg.vector_norm(weight.float()))
        changes.append(_Change(part.name, module.rank, module.scale, delta, base))
    return changes


def _summary(changes: Sequence[_Change], num_in_model: int) -> dict[str, object]:
    delta = math.hypot(*(change.delta for change in changes))
    bases = [change.base for change in changes if change.base is not None]
    base = math.hypot(*bases) if len(bases) == len(changes) else 0.0
    return {
        "modules": {
            "hit": sum(change.delta > 0 for change in changes),
            "targeted": len(changes),
            "in_model": num_in_model,
        },
        "rank": [min(change.rank for change in changes), max(change.rank for change in changes)],
        "scale": [min(change.scale for change in changes), max(change.scale for change in changes)],
        "delta_norm": delta,
        "relative_norm": delta / base if base else None,
    }


def product_norm(A_RK: torch.Tensor, B_RO: torch.Tensor) -> float:
    """Frobenius norm of B^T A without forming it: ||B A||^2 = trace((B B^T)(A A^T)) = sum of (B B^T) * (A A^T).

    The cost is that of R x R products. In fp32 the result is exact to about 1e-3 ||A|| ||B||.
    """
    (gram_a, scale_a), (gram_b, scale_b) = _gram(A_RK.float()), _gram(B_RO.float())
    squared = float((gram_a * gram_b).sum())
    return math.sqrt(max(squared, 0.0)) * scale_a * scale_b


def _gram(rows_RC: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Products of all rows with each other, float64 [R, R], and what the rows were divided by first: 1, unless their
    squares overflow or vanish."""
    gram_RR = rows_RC @ rows_RC.T
    if _SMALLEST_SQUARE < float(gram_RR.diagonal().max()) < math.inf:
        return gram_RR.double(), 1.0
    scale = float(rows_RC.abs().max()) or 1.0
    rows_RC = rows_RC / scale
    return (rows_RC @ rows_RC.T).double(), scale
