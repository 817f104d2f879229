"""``lorikeet check-adapter``: would the server take this adapter, and what would it do?

The base model's configuration is read, never its weights, unless the adapter's norms are to be compared with theirs or
the file holds a copy of its embedding.
"""

from __future__ import annotations

from typing import Any, cast

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.limits import resolve_limits
from lorikeet.adapters.sources.source import SourceOptions, resolve_source
from lorikeet.adapters.templates import read_templates
from lorikeet.config import Settings
from lorikeet.core.adapters import format_report
from lorikeet.errors import AdapterError, ModelError
from lorikeet.lora.base_weights import BaseWeight, checkpoint_weight
from lorikeet.lora.loader import load_adapter
from lorikeet.lora.report import adapter_report
from lorikeet.models.source import locate_model
from lorikeet.models.spec import read_model_spec
from lorikeet.utils import format_table
from lorikeet.worker.spec import resolve_dtype


def check_adapter(settings: Settings, *, base_norms: bool) -> dict[str, object]:
    """The report of the one adapter in ``--lora-paths``, with its path and digest.

    Args:
        settings: their limits on rank and modules apply as they would in the server.
        base_norms: also read the base's weights of the changed modules, for the size of the change beside them.

    Raises:
        AdapterError: the server would refuse it.
        ConfigError, ModelError: the limits or the base model are wrong.
    """
    (adapter_path,) = settings.lora.lora_paths
    model_dir = locate_model(settings.model_path, weights=base_norms)
    spec = read_model_spec(model_dir)
    dtype = resolve_dtype(settings, spec)
    directory = resolve_source(adapter_path.path)
    limits = resolve_limits(
        spec.lora_sites,
        max_rank=settings.lora.max_lora_rank,
        targets=settings.lora.lora_target_modules,
        paths=settings.lora.lora_paths,
        sources=SourceOptions.from_config(settings.lora).trusted(),
    )
    layout = PoolLayout.make(
        spec.lora_sites,
        limits.targets,
        max_rank=limits.max_rank,
        max_loras_per_batch=1,
        element_size=dtype.itemsize,
    )
    base_weight = checkpoint_weight(model_dir)
    adapter = load_adapter(
        adapter_path.name,
        directory,
        spec.lora_sites,
        layout,
        dtype,
        base_weight=_embedding_of(base_weight),
    )
    read_templates(directory)
    report = adapter_report(
        adapter, spec.lora_sites, base_weight=base_weight if base_norms else None
    )
    return {"path": str(directory), "digest": adapter.digest, **report}


def format_check(report: dict[str, object], *, width: int) -> str:
    """The report as a table of the kinds of modules, and one line for the whole."""
    kinds = cast("dict[str, dict[str, Any]]", report["kinds"])
    rows = [
        (
            name,
            "{hit} of {targeted}".format_map(kind["modules"]),
            _range(kind["rank"]),
            _range(kind["scale"]),
            f"{kind['delta_norm']:.4g}",
            "-" if kind["relative_norm"] is None else f"{kind['relative_norm']:.2%}",
        )
        for name, kind in kinds.items()
    ]
    header = ("module", "hit", "rank", "scale", "norm of the change", "of the base")
    return f"{format_table(header, rows, width=width)}\n{format_report(report)}"


def _range(ends: list[float]) -> str:
    least, most = ends
    return f"{least:.4g}" if least == most else f"{least:.4g} to {most:.4g}"


def _embedding_of(base_weight: BaseWeight) -> BaseWeight:
    """Without the base's weights at hand the loader says itself what it cannot compare."""

    def read(name: str) -> Any:
        try:
            return base_weight(name)
        except ModelError as error:
            raise AdapterError(
                f"the adapter holds a copy of the base's {name}, but {error}"
            ) from error

    return read
