"""An adapter's directory -> :class:`HostAdapter`, or an error that names what does not fit.

Strict in both directions: every module that the configuration targets must have its pair of tensors, and every tensor
must belong to such a module. Names and shapes are checked from the file's header before any weight is read.

Shape legend: R rank, K input features, O output features of a module, C = K + O.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lorikeet.adapters.layout import PoolLayout
from lorikeet.adapters.sources.source import WEIGHTS_FILE, weights_file
from lorikeet.adapters.spec import LoRASpec, read_adapter_config
from lorikeet.adapters.targets import ModuleKey, ModuleLoRA, resolve_targets
from lorikeet.core.sites import LoRASite, SiteSlice
from lorikeet.errors import AdapterError
from lorikeet.layers.linear import ShardRule
from lorikeet.lora.adapter import HostAdapter, PackedModule
from lorikeet.lora.base_weights import BaseWeight, is_copy
from lorikeet.lora.pool_plan import shard_pair
from lorikeet.lora.tensors import TORCH_TYPES, TensorFile, empty_flat, open_tensors

_PREFIX = "base_model.model."
_INTEGERS = {2: torch.int16, 4: torch.int32}
# Bits of an infinity without its sign.
_INFINITY = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A module that the configuration targets, and the tensors that must be there for it."""

    key: ModuleKey
    site: LoRASite
    part: SiteSlice
    lora: ModuleLoRA

    @property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """Names of A and B in the file -> their shapes, A first."""
        path, rank = _PREFIX + self.part.hf_path, self.lora.rank
        if self.site.kind == "embedding":
            names = (f"{path}.lora_embedding_A", f"{path}.lora_embedding_B")
        else:
            names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
        return {names[0]: (rank, self.site.in_features), names[1]: (self.part.out_features, rank)}


def load_adapter(
    name: str,
    directory: Path,
    sites: Sequence[LoRASite],
    layout: PoolLayout,
    dtype: torch.dtype,
    *,
    base_weight: BaseWeight | None = None,
    rules: Sequence[ShardRule] | None = None,
) -> HostAdapter:
    """Read, check and pack an adapter.

    Args:
        sites: of the whole model, not of a shard.
        layout: of the pool on this rank; its ``max_rank`` and ``targets`` are the limits.
        dtype: of the pool.
        base_weight: the base model's weights by name, to recognise copies of its embedding in the file. Without it an
            adapter that carries such a copy is refused.
        rules: of the sites, which part of each this rank holds; None is a single rank, which holds all.

    Raises:
        AdapterError: the adapter cannot be served exactly; names the field, tensor, module or file.
    """
    spec = read_adapter_config(directory)
    modules = resolve_targets(spec, sites)
    _check_limits(modules, sites, layout)
    wanted = [
        _Wanted(key, sites[key[0]], sites[key[0]].slices[key[1]], lora)
        for key, lora in modules.items()
    ]
    path = directory / WEIGHTS_FILE
    if not os.path.exists(path):
        # Raises an error that says what is there instead.
        path = weights_file(directory)
    with open_tensors(path) as file:
        _check_header(file, wanted, sites, path)
        _check_copies(file, sites, base_weight, path)
        packer = _Packer(layout, dtype, rules)
        try:
            tensors = file.read_all(name for module in wanted for name in module.tensors)
            for module in wanted:
                A_RK, B_OR = (tensors[name] for name in module.tensors)
                packer.add(module, A_RK, B_OR)
            return packer.finish(name, str(directory), spec)
        finally:
            packer.close()


def _check_limits(
    modules: dict[ModuleKey, ModuleLoRA], sites: Sequence[LoRASite], layout: PoolLayout
) -> None:
    outside = {sites[site].slices[part].name for site, part in modules} - layout.targets
    if outside:
        raise AdapterError(
            f"adapter is incompatible: it changes {', '.join(sorted(outside))}, but --lora-target-modules allows "
            f"{', '.join(sorted(layout.targets))}"
        )
    rank = max(module.rank for module in modules.values())
    if rank > layout.max_rank:
        raise AdapterError(
            f"adapter is incompatible: its rank is {rank}, but --max-lora-rank is {layout.max_rank}"
        )


def _check_header(
    file: TensorFile, wanted: Sequence[_Wanted], sites: Sequence[LoRASite], path: Path
) -> None:
    """Every tensor must be expected, and every expected tensor must be there in the right shape and a known type."""
    expected = {name: shape for module in wanted for name, shape in module.tensors.items()}
    found = file.tensors
    for name in sorted(set(found) - set(expected) - set(_copy_names(sites))):
        raise AdapterError(
            f"{path}: tensor {name} matches no module that the adapter's configuration targets in the base model"
        )
    for name, shape in expected.items():
        if name not in found:
            raise AdapterError(
                f"{path}: tensor {name} is missing; the configuration targets its module"
            )
        stored = found[name]
        if stored.shape != shape:
            raise AdapterError(
                f"{path}: tensor {name} has shape {list(stored.shape)}, but the base model and the configured "
                f"rank need {list(shape)}; was the adapter made for another base model?"
            )
        if stored.dtype not in TORCH_TYPES:
            raise AdapterError(
                f"{path}: tensor {name} is of type {stored.dtype}; allowed: {', '.join(TORCH_TYPES)}"
            )


def _copy_names(sites: Sequence[LoRASite]) -> dict[str, str]:
    """Names under which PEFT saves a copy of the base's embeddings -> the base's own name of that weight."""
    paths = [site.slices[0].hf_path for site in sites if site.kind in ("embedding", "lm_head")]
    return {
        f"{_PREFIX}{path}{infix}.weight": f"{path}.weight"
        for path in paths
        for infix in ("", ".base_layer")
    }


def _check_copies(
    file: TensorFile, sites: Sequence[LoRASite], base_weight: BaseWeight | None, path: Path
) -> None:
    """Refuse added or retrained tokens; a true copy of the base's embedding is left unread."""
    for name, parameter in _copy_names(sites).items():
        if name not in file.tensors:
            continue
        base = base_weight(parameter) if base_weight else None
        if base is None:
            raise AdapterError(
                f"{path}: tensor {name} replaces {parameter} of the base model (added tokens?), which is not "
                "implemented, and there is no weight to compare it with"
            )
        stored = file.tensors[name]
        if stored.shape != tuple(base.shape):
            raise AdapterError(
                f"{path}: tensor {name} has shape {list(stored.shape)} and the base model's {list(base.shape)}; added tokens "
                "are not implemented"
            )
        if stored.dtype not in TORCH_TYPES or not is_copy(file.read(name), base):
            raise AdapterError(
                f"{path}: tensor {name} differs from the base model's {parameter}; added or retrained tokens are not "
                "implemented"
            )


class _Packer:
    """Collects modules, their digest, and at the end their rank pages.

    The digest takes about as long as everything else, so it has a thread of its own; both let the engine's loop run.
    """

    def __init__(
        self, layout: PoolLayout, dtype: torch.dtype, rules: Sequence[ShardRule] | None
    ) -> None:
        self._layout = layout
        self._dtype = dtype
        self._rules = rules
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-digest")
        self._hashed: list[Future[None]] = []
        self._pairs: list[tuple[_Wanted, torch.Tensor, torch.Tensor]] = []
        self._changes = False

    def add(self, module: _Wanted, A_RK: torch.Tensor, B_OR: torch.Tensor) -> None:
        """Check the values of one module's pair and take this rank's part of it."""
        self._hashed.append(self._thread.submit(self._hash, module, A_RK, B_OR))
        is_zero = [
            _is_zero(tensor, name)
            for name, tensor in zip(module.tensors, (A_RK, B_OR), strict=True)
        ]
        self._changes = self._changes or (module.lora.scale != 0 and not any(is_zero))
        site, part = module.key
        if self._rules is not None:
            A_RK, B_OR = shard_pair(A_RK, B_OR, self._rules[site], part)
        self._pairs.append((module, A_RK, B_OR))

    def finish(self, name: str, path: str, spec: LoRASpec) -> HostAdapter:
        """The packed adapter.

        Raises:
            AdapterError: it would change nothing.
        """
        if not self._changes:
            raise AdapterError(
                "the adapter would change nothing: A, B or the scale is zero in every module"
            )
        page_sizes: list[int] = []
        page_classes: list[int] = []
        modules: list[PackedModule] = []
        page_ranks = self._layout.page_ranks
        for wanted, A_RK, B_OR in self._pairs:
            (site, part), rank = wanted.key, wanted.lora.rank
            num_pages = self._layout.num_pages(rank)
            modules.append(
                PackedModule(site, part, rank, wanted.lora.scale, len(page_sizes), num_pages)
            )
            page_sizes += [page_ranks * (A_RK.shape[1] + B_OR.shape[0])] * num_pages
            page_classes += [self._layout.classes[site, part]] * num_pages
        data = empty_flat(sum(page_sizes), self._dtype)
        begin = 0
        for (wanted, A_RK, B_OR), module in zip(self._pairs, modules, strict=True):
            end = begin + page_sizes[module.first_page] * module.num_pages
            self._pack(wanted, A_RK, B_OR, data[begin:end])
            begin = end
        for hashed in self._hashed:
            hashed.result()  # equal digests mean equal weights: none may be missing
        return HostAdapter(
            name=name,
            path=path,
            digest=self._digest.hexdigest(),
            spec=spec,
            data=data,
            page_sizes=tuple(page_sizes),
            page_classes=tuple(page_classes),
            modules=tuple(modules),
            rank=max(module.rank for module in modules),
            targets=tuple(sorted({wanted.part.name for wanted, _, _ in self._pairs})),
        )

    def close(self) -> None:
        """End the thread that hashes, after a failure, too."""
        self._thread.shutdown(cancel_futures=True)

    def _hash(self, module: _Wanted, A_RK: torch.Tensor, B_OR: torch.Tensor) -> None:
        for name, tensor in zip(module.tensors, (A_RK, B_OR), strict=True):
            self._digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            self._digest.update(tensor.view(torch.uint8).numpy().data)
        self._digest.update(json.dumps([module.lora.rank, module.lora.scale]).encode())

    def _pack(
        self, module: _Wanted, A_RK: torch.Tensor, B_OR: torch.Tensor, data: torch.Tensor
    ) -> None:
        """Write one module's pages: rows of A, then of B transposed, and zeros up to the last page's end."""
        rank, num_inputs = A_RK.shape
        block_RC = data.view(-1, num_inputs + B_OR.shape[0])
        _copy(block_RC[:rank, :num_inputs], A_RK)
        _copy(block_RC[:rank, num_inputs:], B_OR.T)
        block_RC[rank:].zero_()
        if A_RK.dtype != self._dtype and not _is_finite(data):
            raise AdapterError(
                f"weights of {module.part.hf_path} do not fit the pool's type {self._dtype}"
            )


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """As ``target.copy_(source)``. Transposing is several times faster in numpy, which takes one thread for it."""
    if target.dtype != source.dtype:
        target.copy_(source)
    else:
        np.copyto(_bits(target), _bits(source))


def _bits(tensor: torch.Tensor) -> np.ndarray:
    """The values' bits, as integers without a sign."""
    as_int = tensor.view(_INTEGERS[tensor.element_size()])
    return as_int.numpy().view(f"u{tensor.element_size()}")


def _largest(tensor: torch.Tensor) -> int:
    """Bits of the largest magnitude: ordered as the magnitudes are, infinities and NaN above all others, zero 0."""
    if not tensor.numel():
        return 0
    bits = _bits(tensor)
    return int(np.bitwise_and(bits, np.iinfo(bits.dtype).max >> 1).max())


def _is_finite(tensor: torch.Tensor) -> bool:
    return _largest(tensor) < _INFINITY[tensor.dtype]


def _is_zero(tensor: torch.Tensor, name: str) -> bool:
    """True if all values are zero.

    Raises:
        AdapterError: some are not finite.
    """
    largest = _largest(tensor)
    if largest >= _INFINITY[tensor.dtype]:
        raise AdapterError(f"tensor {name} holds NaN or infinite values")
    return not largest
