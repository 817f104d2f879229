"""The ways to compute attention that the bake-off compares, each as ``prepare(case) -> Prepared``.

A library is imported by the path that needs it, so that one that is missing takes only its own paths away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.ops.attention_cases import DEVICE, DTYPE, Case, H, K, Q

_WORKSPACE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Prepared:
    """``run(i)`` computes set i and may be captured in a graph; ``plan`` is the host work that a step repeats."""

    run: Callable[[int], torch.Tensor]
    plan: Callable[[], None] | None = None


@dataclass(frozen=True)
class Path:
    """One way.

    Attributes:
        kind: decode or prefill.
        module: what ``build`` compiles for it beforehand; None if it compiles itself in the first call, or not at all.
    """

    name: str
    kind: str
    prepare: Callable[[Case], Prepared]
    module: str | None = None
    page_size: int = 16


def _workspace() -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)


def _flashinfer_decode(case: Case, **options: Any) -> Prepared:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    rows = len(case.shape.keys)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(),
        "NHD",
        use_cuda_graph=True,
        paged_kv_indptr_buffer=torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE),
        paged_kv_indices_buffer=torch.zeros(len(case.indices), dtype=torch.int32, device=DEVICE),
        paged_kv_last_page_len_buffer=torch.zeros(rows, dtype=torch.int32, device=DEVICE),
        **options,
    )

    def plan() -> None:
        wrapper.plan(
            case.indptr_host,
            case.indices,
            case.last_page_len_host,
            Q,
            K,
            H,
            case.page_size,
            q_data_type=DTYPE,
            kv_data_type=DTYPE,
        )

    plan()
    return Prepared(lambda i: wrapper.run(case.q[i], (case.k[i], case.v[i])), plan)


def _fa2(case: Case) -> Prepared:
    return _flashinfer_decode(case)


def _fa2_tc(case: Case) -> Prepared:
    return _flashinfer_decode(case, use_tensor_cores=True, backend="fa2")


def _fa3_decode(case: Case) -> Prepared:
    return _flashinfer_decode(case, use_tensor_cores=True, backend="fa3")


def _holistic(case: Case) -> Prepared:
    from flashinfer.attention import BatchAttention

    wrapper = BatchAttention("NHD", DEVICE)

    def plan() -> None:
        wrapper.plan(
            case.query_starts_host,
            case.indptr_host,
            case.indices,
            case.kv_lens_host,
            Q,
            K,
            H,
            H,
            case.page_size,
            causal=case.shape.queries != (1,) * len(case.shape.queries),
            sm_scale=H**-0.5,
            q_data_type=DTYPE,
            kv_data_type=DTYPE,
        )

    plan()
    return Prepared(lambda i: wrapper.run(case.q[i], (case.k[i], case.v[i]))[0], plan)


def _xqa(sm_factor: int, max_pages: int = 0) -> Callable[[Case], Prepared]:
    """XQA.

    Args:
        sm_factor: it is told that the device has so many times its multiprocessors: it cuts sequences into as many parts
            as fill them.
        max_pages: width of the page table, as in a CUDA graph that must serve the longest sequence; 0 is no wider than
            needed.
    """

    def prepare(case: Case) -> Prepared:
        from flashinfer.xqa import xqa

        semaphores = torch.zeros(8 * 2**20, dtype=torch.uint8, device=DEVICE)
        scratch = _workspace()
        lens_N1 = case.kv_lens_N.view(torch.uint32).unsqueeze(1)
        sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count * sm_factor
        table_NP = case.page_table_NP
        if max_pages > table_NP.shape[1]:
            table_NP = torch.nn.functional.pad(table_NP, (0, max_pages - table_NP.shape[1]))

        def run(i: int) -> torch.Tensor:
            out = torch.empty_like(case.q[i])
            xqa(
                case.q[i].unsqueeze(1),
                case.k[i],
                case.v[i],
                table_NP,
                lens_N1,
                out.unsqueeze(1),
                scratch,
                semaphores,
                K,
                case.page_size,
                q_scale=1.0,
                kv_scale=1.0,
                sm_count=sms,
            )
            return out

        return Prepared(run)

    return prepare


def _triton(case: Case) -> Prepared:
    """Our own."""
    from lorikeet.ops.triton.attention import decode_attention_triton

    def run(i: int) -> torch.Tensor:
        out = torch.empty_like(case.q[i])
        kv = (case.k[i], case.v[i])
        table, lens = case.page_table_NP, case.kv_lens_N
        decode_attention_triton(case.q[i], kv, table, lens, H**-0.5, None, out)
        return out

    return Prepared(run)


def _paged_prefill(backend: str) -> Callable[[Case], Prepared]:
    def prepare(case: Case) -> Prepared:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend=backend)

        def plan() -> None:
            wrapper.plan(
                case.query_starts_host,
                case.indptr_host,
                case.indices,
                case.last_page_len_host,
                Q,
                K,
                H,
                case.page_size,
                causal=True,
                q_data_type=DTYPE,
                kv_data_type=DTYPE,
            )

        plan()
        return Prepared(lambda i: wrapper.run(case.q[i], (case.k[i], case.v[i])), plan)

    return prepare


def _ragged_prefill(backend: str) -> Callable[[Case], Prepared]:
    """Keys gathered once outside of the timing: what a prompt without a prefix could use, whose keys are at hand."""

    def prepare(case: Case) -> Prepared:
        from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

        kv_starts_host = torch.zeros(len(case.shape.keys) + 1, dtype=torch.int32)
        kv_starts_host[1:] = case.kv_lens_host.cumsum(0)
        wrapper = BatchPrefillWithRaggedKVCacheWrapper(_workspace(), "NHD", backend=backend)

        def plan() -> None:
            wrapper.plan(
                case.query_starts_host,
                kv_starts_host,
                Q,
                K,
                H,
                causal=True,
                q_data_type=DTYPE,
                kv_data_type=DTYPE,
            )

        plan()
        k = [_gathered(case, k) for k in case.k]
        v = [_gathered(case, v) for v in case.v]
        return Prepared(lambda i: wrapper.run(case.q[i], k[i], v[i]), plan)

    return prepare


def _gathered(case: Case, pages: torch.Tensor) -> torch.Tensor:
    parts = []
    for row, length in enumerate(case.shape.keys):
        used = case.page_table_NP[row, : -(-length // case.page_size)].long()
        parts.append(pages[used].flatten(0, 1)[:length])
    return torch.cat(parts).contiguous()


def _fa4(case: Case) -> Prepared:
    from flash_attn.cute import flash_attn_varlen_func

    def run(i: int) -> torch.Tensor:
        result = flash_attn_varlen_func(
            case.q[i],
            case.k[i],
            case.v[i],
            cu_seqlens_q=case.query_starts,
            seqused_k=case.kv_lens_N,
            max_seqlen_q=max(case.shape.queries),
            max_seqlen_k=max(case.shape.keys),
            page_table=case.page_table_NP,
            causal=True,
        )
        return result[0] if isinstance(result, tuple) else result

    return Prepared(run)


def _sgl_fa3(case: Case) -> Prepared:
    """FlashAttention-3 as ``sglang-kernel`` ships it, compiled; it chooses its parts by itself."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    def run(i: int) -> torch.Tensor:
        return flash_attn_with_kvcache(
            case.q[i],
            case.k[i],
            case.v[i],
            page_table=case.page_table_NP,
            cache_seqlens=case.kv_lens_N,
            cu_seqlens_q=case.query_starts,
            max_seqlen_q=max(case.shape.queries),
            causal=True,
        )

    return Prepared(run)


def _varlen(case: Case) -> Prepared:
    """Torch's own, over pages from torch 2.13 on: FlashAttention-2, unless another one is installed and activated."""
    from torch.nn.attention.varlen import varlen_attn

    kv_starts = torch.nn.functional.pad(case.kv_lens_N.cumsum(0), (1, 0)).to(torch.int32)

    def run(i: int) -> torch.Tensor:
        found: Any = varlen_attn(
            case.q[i],
            case.k[i],
            case.v[i],
            case.query_starts,
            kv_starts,
            max(case.shape.queries),
            max(case.shape.keys),
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=case.kv_lens_N,
            block_table=case.page_table_NP,
        )
        return found

    return Prepared(run)


def _sdpa(case: Case) -> Prepared:
    """The oracle of the tests: gathers, then torch's own kernels, one sequence after the other."""
    from torch.nn.functional import scaled_dot_product_attention

    def run(i: int) -> torch.Tensor:
        parts = []
        start = 0
        for row, (queries, length) in enumerate(
            zip(case.shape.queries, case.shape.keys, strict=True)
        ):
            used = case.page_table_NP[row, : -(-length // case.page_size)].long()
            k_KLH, v_KLH = (
                pages[used].flatten(0, 1)[:length].transpose(0, 1)
                for pages in (case.k[i], case.v[i])
            )
            q_QTH = case.q[i][start : start + queries].transpose(0, 1)
            mask = None
            if queries != length:
                position = torch.arange(length, device=DEVICE)
                mask = position <= position[length - queries :, None]
            out_QTH = scaled_dot_product_attention(
                q_QTH[None],
                k_KLH[None],
                v_KLH[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )[0]
            parts.append(out_QTH.transpose(0, 1))
            start += queries
        return torch.cat(parts)

    return Prepared(run)


PATHS = [
    Path("xqa", "decode", _xqa(1), "xqa-16"),
    Path("xqa-wide", "decode", _xqa(1, max_pages=8192), "xqa-16"),
    Path("xqa-split2", "decode", _xqa(2), "xqa-16"),
    Path("xqa-split4", "decode", _xqa(4), "xqa-16"),
    Path("triton", "decode", _triton),
    Path("fa2-tc", "decode", _fa2_tc, "prefill-fa2"),
    Path("fa2", "decode", _fa2, "decode-fa2"),
    Path("fa3-paged", "prefill", _paged_prefill("fa3"), "prefill-fa3"),
    Path("fa2-paged", "prefill", _paged_prefill("fa2"), "prefill-fa2"),
    Path("xqa-page32", "decode", _xqa(1), "xqa-32", page_size=32),
    Path("xqa-page64", "decode", _xqa(1), "xqa-64", page_size=64),
    Path("fa4", "decode", _fa4),
    Path("fa4-paged", "prefill", _fa4),
    Path("sgl-fa3", "decode", _sgl_fa3),
    Path("sgl-fa3-page64", "decode", _sgl_fa3, page_size=64),
    Path("sgl-fa3-paged", "prefill", _sgl_fa3),
    Path("varlen", "decode", _varlen),
    Path("varlen-page256", "decode", _varlen, page_size=256),
    Path("varlen-page256-paged", "prefill", _varlen, page_size=256),
    Path("fa3-dec", "decode", _fa3_decode, "prefill-fa3"),
    Path("holistic", "decode", _holistic, "holistic"),
    Path("fa3-ragged", "prefill", _ragged_prefill("fa3"), "prefill-fa3"),
    Path("sdpa", "prefill", _sdpa),
]
MODULES = sorted({path.module for path in PATHS if path.module})


def build(module: str) -> None:
    """Compile a module of FlashInfer into its cache and load it.

    Raises:
        RuntimeError: the compiler failed; its output is the message.
    """
    from flashinfer.jit import attention as generators
    from flashinfer.jit.xqa import gen_xqa_module

    # The trailing booleans: sliding window, logits soft cap, then fp16 products or a profiler.
    types = (DTYPE, DTYPE, DTYPE, torch.int32, H, H, 0)
    plain = (False, False)
    kind, _, variant = module.partition("-")
    if kind == "xqa":
        spec = gen_xqa_module(
            DTYPE, DTYPE, int(variant), H, Q // K, use_sliding_window=False, output_dtype=DTYPE
        )
    elif kind == "prefill":
        spec = generators.gen_batch_prefill_module(
            variant, *types, *plain, use_fp16_qk_reduction=False
        )
    elif kind == "decode":
        spec = generators.gen_batch_decode_module(*types, *plain)
    else:
        spec = generators.gen_batch_attention_module(*types, *plain)
    spec.build_and_load()
