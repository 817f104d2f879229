"""Attention by ``torch.nn.functional.scaled_dot_product_attention`` over gathered pages: the CPU path, and the oracle of
the others.

Prompt chunks are computed one sequence at a time, rows that decode in batches. What only depends on the step (which
places to gather, which to mask) is worked out once for each window size and used by all layers.

On a GPU it serves float32, and is what the other backends are compared with. A step for a CUDA graph gathers as many
places for every row as the longest sequence may have, and takes lengths and pages from the device alone.

Shape legend: T tokens of the step, N sequences, M rows of one batch, L keys (padded), Q query heads, K key/value heads,
G = Q / K query heads that share a key head, H head size, C token places in the cache, X query or key heads.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorikeet.attention.base import AttentionInputs
from lorikeet.kv.storage import KVStorage

# Rows that decode are batched with rows of about their length, so that a long one does not pad the short ones: lengths
# up to 2 ** 8 together, beyond that by powers of two.
_SMALLEST_BUCKET = 8
# A captured step gathers this many keys for each row, however few it has: 1024 keys of 8 heads of 128 are 4 MB a row.
_MAX_GRAPH_KV_LEN = 1024


@dataclass(frozen=True, slots=True)
class _DecodeBatch:
    """Rows with one query each.

    Attributes:
        rows_M: their rows of T; None if they are all rows in order.
        places_ML: cache places of their keys. Padding repeats a row's own newest place, because a place that was never
            written may hold NaN, which survives being masked.
        mask_M11L: True where a key counts; None if nothing is padded.
    """

    rows_M: torch.Tensor | None
    places_ML: torch.Tensor
    mask_M11L: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Consecutive queries of one sequence.

    Attributes:
        start, end: rows of T.
        places_L: cache places of the keys; None if they are exactly this step's own.
        mask: [queries, L], True where a key counts; None is plain causal.
    """

    start: int
    end: int
    places_L: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _WindowLayout:
    """What the layers of one window size gather and mask in a step."""

    batches: list[_DecodeBatch]
    chunks: list[_Chunk]


class SDPABackend:
    """See :class:`lorikeet.attention.base.AttentionBackend`."""

    name = "sdpa"

    def __init__(self) -> None:
        self._inputs: AttentionInputs | None = None
        self._places_NC = torch.empty(0, 0, dtype=torch.int64)
        # By window, and by whether a graph is being captured: what is worked out in a capture exists only when the
        # graph runs, and what was worked out before would stay as it is in every replay.
        self._layouts: dict[tuple[int | None, bool], _WindowLayout] = {}

    def storage_head_dim(self, head_dim: int) -> int:
        return head_dim

    def graph_kv_lens(self, bucket: int, longest: int) -> tuple[int, ...]:
        return (min(longest, _MAX_GRAPH_KV_LEN),)

    def prepare(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._layouts = {}
        if inputs.bucket is None:
            self._places_NC = _all_places(inputs)

    def forward(
        self,
        q_TQH: torch.Tensor,
        k_TKH: torch.Tensor,
        v_TKH: torch.Tensor,
        kv: KVStorage,
        layer: int,
        inputs: AttentionInputs,
        window: int | None,
    ) -> torch.Tensor:
        layout = self._layout(inputs, window)
        k_CKH, v_CKH = kv.k[layer], kv.v[layer]
        if len(layout.batches) == 1 and layout.batches[0].rows_M is None:
            return _decode(q_TQH, k_CKH, v_CKH, layout.batches[0])
        o_TQH = torch.empty(q_TQH.shape, dtype=q_TQH.dtype, device=q_TQH.device)
        for batch in layout.batches:
            assert batch.rows_M is not None
            rows = batch.rows_M
            o_TQH[rows] = _decode(q_TQH.index_select(0, rows), k_CKH, v_CKH, batch)
        for chunk in layout.chunks:
            part = slice(chunk.start, chunk.end)
            if chunk.places_L is None:
                k_LKH, v_LKH = k_TKH[part], v_TKH[part]
            else:
                k_LKH = k_CKH.index_select(0, chunk.places_L)
                v_LKH = v_CKH.index_select(0, chunk.places_L)
            o_TQH[part] = _prefill(q_TQH[part], k_LKH, v_LKH, chunk.mask)
        return o_TQH

    def _layout(self, inputs: AttentionInputs, window: int | None) -> _WindowLayout:
        if inputs is not self._inputs:
            self.prepare(inputs)
        key = (window, _is_captured(inputs))
        layout = self._layouts.get(key)
        if layout is None:
            if inputs.bucket is None:
                layout = _make_layout(inputs, self._places_NC, window)
            else:
                layout = _WindowLayout([_make_static_batch(inputs, window)], [])
            self._layouts[key] = layout
        return layout


def _decode(
    q_MQH: torch.Tensor, k_CKH: torch.Tensor, v_CKH: torch.Tensor, batch: _DecodeBatch
) -> torch.Tensor:
    num_rows, num_keys = batch.places_ML.shape
    places = batch.places_ML.view(-1)
    k_MKLH = k_CKH.index_select(0, places).unflatten(0, (num_rows, num_keys)).transpose(1, 2)
    v_MKLH = v_CKH.index_select(0, places).unflatten(0, (num_rows, num_keys)).transpose(1, 2)
    # The G heads that share a key head stand where a prompt would have G queries: no key is repeated in memory.
    q_MKGH = q_MQH.unflatten(1, (k_CKH.shape[1], -1))
    o_MKGH = scaled_dot_product_attention(q_MKGH, k_MKLH, v_MKLH, attn_mask=batch.mask_M11L)
    return o_MKGH.flatten(1, 2)


def _prefill(
    q_LQH: torch.Tensor, k_LKH: torch.Tensor, v_LKH: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    q_1QLH, k_1KLH, v_1KLH = (x_LXH.transpose(0, 1).unsqueeze(0) for x_LXH in (q_LQH, k_LKH, v_LKH))
    o_1QLH = scaled_dot_product_attention(
        q_1QLH, k_1KLH, v_1KLH, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return o_1QLH.squeeze(0).transpose(0, 1)


def _all_places(inputs: AttentionInputs) -> torch.Tensor:
    """Cache places of every position that the page tables cover, [N, positions]."""
    offsets = torch.arange(inputs.page_size, device=inputs.page_table_NP.device)
    return (inputs.page_table_NP.unsqueeze(-1) * inputs.page_size + offsets).flatten(1).long()


def _is_captured(inputs: AttentionInputs) -> bool:
    return inputs.page_table_NP.is_cuda and torch.cuda.is_current_stream_capturing()


def _on_device(values: list[int], device: torch.device) -> torch.Tensor:
    """int64 on the device, without waiting for it."""
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _make_layout(
    inputs: AttentionInputs, places_NC: torch.Tensor, window: int | None
) -> _WindowLayout:
    buckets: defaultdict[int, list[int]] = defaultdict(list)
    chunks: list[_Chunk] = []
    for sequence, kv_len in enumerate(inputs.kv_lens):
        start, end = inputs.query_starts[sequence : sequence + 2]
        if end - start == 1:
            length = kv_len if window is None else min(kv_len, window)
            buckets[max((length - 1).bit_length(), _SMALLEST_BUCKET)].append(sequence)
        else:
            chunks.append(_make_chunk(inputs, places_NC, sequence, window))
    batches = [
        _make_decode_batch(inputs, places_NC, members, window) for members in buckets.values()
    ]
    return _WindowLayout(batches, chunks)


def _make_decode_batch(
    inputs: AttentionInputs, places_NC: torch.Tensor, members: list[int], window: int | None
) -> _DecodeBatch:
    device = places_NC.device
    kv_lens = [inputs.kv_lens[member] for member in members]
    lengths = kv_lens if window is None else [min(length, window) for length in kv_lens]
    longest = max(lengths)
    last_M1 = _on_device(kv_lens, device).unsqueeze(1) - 1
    first_M1 = last_M1 + 1 - _on_device(lengths, device).unsqueeze(1)
    positions_ML = first_M1 + torch.arange(longest, device=device)
    # One query for each sequence: then every sequence is here, and rows, members and sequences are the same numbers.
    is_whole = len(members) == len(inputs.kv_lens) == inputs.query_starts[-1]
    if not is_whole:
        places_NC = places_NC.index_select(0, _on_device(members, device))
    rows = [inputs.query_starts[member] for member in members]
    mask_ML = None if min(lengths) == longest else positions_ML <= last_M1
    return _DecodeBatch(
        rows_M=None if is_whole else _on_device(rows, device),
        places_ML=places_NC.gather(1, torch.minimum(positions_ML, last_M1)),
        mask_M11L=None if mask_ML is None else mask_ML[:, None, None, :],
    )


def _make_static_batch(inputs: AttentionInputs, window: int | None) -> _DecodeBatch:
    """All rows, each with as many keys as the page table has room for: shapes and addresses that a graph may keep."""
    size = inputs.page_size
    longest = min(inputs.page_table_NP.shape[1] * size, _MAX_GRAPH_KV_LEN)
    last_M1 = inputs.kv_lens_N.long().unsqueeze(1) - 1
    first_M1 = torch.zeros_like(last_M1)
    if window is not None:
        longest = min(longest, window)
        first_M1 = (last_M1 + 1 - window).clamp_min(0)
    positions_ML = first_M1 + torch.arange(longest, device=last_M1.device)
    inside_ML = torch.minimum(positions_ML, last_M1)
    pages_ML = inputs.page_table_NP.gather(1, inside_ML // size).long()
    mask_ML = positions_ML <= last_M1
    return _DecodeBatch(
        rows_M=None,
        places_ML=pages_ML * size + inside_ML % size,
        mask_M11L=mask_ML[:, None, None, :],
    )


def _make_chunk(
    inputs: AttentionInputs, places_NC: torch.Tensor, sequence: int, window: int | None
) -> _Chunk:
    device = places_NC.device
    start, end = inputs.query_starts[sequence : sequence + 2]
    kv_len = inputs.kv_lens[sequence]
    first_query = kv_len - (end - start)
    has_window = window is not None and window < kv_len
    if first_query == 0 and not has_window:
        return _Chunk(start, end, places_L=None, mask=None)
    first_key = max(0, first_query - window + 1) if window is not None else 0
    keys_L = torch.arange(first_key, kv_len, device=device)
    queries = torch.arange(first_query, kv_len, device=device).unsqueeze(1)
    mask = keys_L <= queries
    if window is not None:
        mask &= keys_L > queries - window
    # A sequence that begins here has all of its keys in this step: nothing to gather.
    places_L = places_NC[sequence, first_key:kv_len] if first_query > 0 else None
    return _Chunk(start, end, places_L, mask)
