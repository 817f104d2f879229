"""Each Triton op run beside its torch twin on the same random operands, whatever the device and the shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorikeet.ops.activation import silu_mul_torch
from lorikeet.ops.draw import draw_tokens_torch
from lorikeet.ops.embedding import embed_torch
from lorikeet.ops.norm import rms_norm_torch
from lorikeet.ops.rope import HeadShape, QKNorm, rope_store_torch
from lorikeet.ops.select import select_ops
from tests.support.numerics import assert_close

EPS = 1e-5


@dataclass
class OpCases:
    """A device, a type and a stream of random numbers."""

    device: str
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.triton = select_ops("cuda")
        self._padding = 0
        self._generator = torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int, strided: bool = False) -> torch.Tensor:
        """Standard normal; ``strided``: a view of every row's first part, of rows longer than those before."""
        self._padding += 16 if strided else 0
        width = shape[-1] + (self._padding if strided else 0)
        wide = torch.randn(*shape[:-1], width, generator=self._generator, device=self.device)
        return wide.to(self.dtype)[..., : shape[-1]]

    def integers(self, below: int, *shape: int) -> torch.Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.device)

    def rms_norm(
        self,
        tokens: int,
        features: int,
        *,
        residual: bool = False,
        delta: bool = False,
        strided: bool = False,
    ) -> None:
        x, weight = self.draw(tokens, features, strided=strided), self.draw(features)
        added = [
            self.draw(tokens, features, strided=strided) if present else None
            for present in (residual, delta)
        ]
        operands = [t for t in (x, weight, *added) if t is not None]
        before = [t.clone() for t in operands]
        y, total = self.triton.rms_norm(x, weight, EPS, *added)
        # The torch form rounds after each of two additions, the kernel after both.
        in_order = (t.float() for t in reversed(added) if t is not None)
        exact = sum(in_order, x.float()).to(self.dtype)
        wanted_y, wanted_total = rms_norm_torch(exact, weight, EPS)
        assert_close("y", y, wanted_y)
        assert torch.equal(total, wanted_total)
        assert all(torch.equal(a, b) for a, b in zip(operands, before, strict=True))

    def silu_mul(
        self, tokens: int, half: int, *, delta: bool = False, strided: bool = False
    ) -> None:
        gate_up = self.draw(tokens, 2 * half, strided=strided)
        added = self.draw(tokens, 2 * half, strided=strided) if delta else None
        before = gate_up.clone()
        wanted = silu_mul_torch(gate_up.float(), None if added is None else added.float())
        assert_close("y", self.triton.silu_mul(gate_up, added), wanted.to(self.dtype))
        assert torch.equal(gate_up, before)

    def rope_store(
        self,
        tokens: int,
        shape: HeadShape,
        *,
        norm: bool = False,
        delta: bool = False,
        padded: int = 0,
        place_dtype: torch.dtype = torch.int64,
        places: int | None = None,
    ) -> None:
        """Args:
        padded: as many of the last tokens have no place.
        """
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        qkv = self.draw(tokens, width, strided=True)
        added = self.draw(tokens, width, strided=True) if delta else None
        weights = self.draw(shape.head_dim), self.draw(shape.head_dim)
        qk_norm = QKNorm(*weights, EPS) if norm else None
        positions = torch.arange(tokens, device=self.device).unsqueeze(1)
        half = torch.arange(shape.head_dim // 2, device=self.device)
        angles = positions * 0.3 ** (half / 4)
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        places = places or tokens + 3
        places_T = torch.randperm(places, generator=self._generator, device=self.device)[:tokens]
        stored = places_T[: tokens - padded]

        def caches() -> list[torch.Tensor]:
            # Heads are padded in storage, and the strides of keys are not those of values.
            heads, size = shape.num_kv_heads, shape.head_dim
            k = torch.empty(places, heads, size + 8, dtype=self.dtype, device=self.device)
            v = torch.empty(places, heads + 1, size + 16, dtype=self.dtype, device=self.device)
            return [cache.fill_(torch.nan)[:, :heads, :size] for cache in (k, v)]

        before = qkv.clone()
        ours, wanted = caches(), caches()
        operands = qkv, cos_sin, *wanted, places_T, shape, qk_norm, added
        wanted_qkv = rope_store_torch(*operands)
        for cache in wanted:
            cache[places_T[tokens - padded :]] = torch.nan
        places_T = places_T.to(place_dtype)
        places_T[tokens - padded :] = -1
        got_qkv = self.triton.rope_store(qkv, cos_sin, *ours, places_T, shape, qk_norm, added)
        for name, got, want in zip("qkv", got_qkv, wanted_qkv, strict=True):
            assert_close(name, got, want)
            storage = got.untyped_storage().data_ptr()
            assert tokens == 0 or storage != qkv.untyped_storage().data_ptr()
        assert got_qkv[0].is_contiguous(), "attention kernels read q as it is"
        for got, want, new in zip(ours, wanted, got_qkv[1:], strict=True):
            assert torch.equal(got[stored], new[: tokens - padded])
            assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(qkv, before)

    def embed(
        self,
        tokens: int,
        vocab: int,
        features: int,
        *,
        lanes: int = 0,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.int64, torch.int64),
    ) -> None:
        """Args:
        lanes: how many sampled tokens ids below 0 refer to; 0: there are no such ids.
        dtypes: of the ids and of the sampled tokens.
        """
        table = self.draw(vocab, features, strided=True)
        ids = self.integers(vocab, tokens)
        sampled = self.integers(vocab, lanes).to(dtypes[1]) if lanes else None
        if lanes:
            lane = self.integers(lanes, tokens)
            lane[0] = lanes - 1
            ids = torch.where(torch.arange(tokens, device=self.device) % 2 == 0, -1 - lane, ids)
        ids = ids.to(dtypes[0])
        got = self.triton.embed(ids, table, sampled)
        assert torch.equal(got, embed_torch(ids, table, sampled))

    def draw_tokens(
        self,
        rows: int,
        vocab: int,
        temperatures: list[float],
        *,
        sharpness: float = 3.0,
        dtypes: tuple[torch.dtype, torch.dtype] = (torch.int64, torch.int64),
    ) -> None:
        """Args:
        temperatures: used in turn.
        dtypes: of lanes and of tokens.
        """
        logits = self.draw(rows, vocab, strided=True).mul_(sharpness)
        logits[:, ::7] = -torch.inf
        temperature = torch.tensor(temperatures, device=self.device).repeat(rows)[:rows]
        seeds = self.integers(2**62, rows) * 2
        counters = self.integers(10_000, rows)
        lanes = torch.randperm(rows + 2, generator=self._generator, device=self.device)[:rows] - 1
        got_lanes = torch.full((rows + 1,), 7, dtype=dtypes[1], device=self.device)
        wanted_lanes = got_lanes.clone()
        rest = temperature, seeds, counters, lanes.to(dtypes[0])
        wanted, wanted_scores = draw_tokens_torch(logits, *rest, wanted_lanes)
        got, scores = self.triton.draw(logits, *rest, got_lanes)
        assert got.tolist() == wanted.tolist()
        assert torch.equal(scores, wanted_scores)
        assert torch.equal(got_lanes, wanted_lanes)
