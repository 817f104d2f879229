"""Sites add up."""

from __future__ import annotations

from lorikeet.core.sites import LoRASite, SiteSlice


def test_out_features_is_the_sum_of_the_slices() -> None:
    slices = (SiteSlice("q_proj", "q", 0, 128), SiteSlice("k_proj", "k", 128, 32))
    assert LoRASite("layers.0.attention.qkv_proj", "column", 0, 64, slices).out_features == 160
