"""What is told of the engine and of its adapters: the fields that replies show, each written once.

Their order and their names here are those of the JSON.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

AdapterState = Literal["loaded", "failed", "loading", "unloading"]


class AdapterUse(msgspec.Struct, frozen=True):
    """Where a version of an adapter is, and who uses it; the same fields as in :class:`AdapterView`."""

    tier: str | None = None
    in_flight: int = 0
    last_use: float | None = None
    reason: str | None = None


class AdapterView(msgspec.Struct, frozen=True, kw_only=True):
    """One meaning of an adapter's name: what requests get, what is being loaded, or what is being unloaded.

    Attributes:
        version: None while it is being loaded, like ``rank``, ``targets`` and ``nbytes``.
        state: a loaded one has ``failed`` while it cannot be read again.
        tier: where its bytes are, of ``adapters/tiers.py``; None: nowhere yet.
        nbytes: of host memory.
        in_flight: requests that hold its version.
        last_use: seconds since the epoch, of the newest request's begin or end; None: never.
        reason: why it cannot be read again; None if it can.
    """

    name: str
    path: str
    version: int | None = None
    state: AdapterState
    tier: str | None = None
    pinned: bool
    rank: int | None = None
    targets: list[str] | None = None
    nbytes: int | None = msgspec.field(default=None, name="bytes")
    in_flight: int = 0
    last_use: float | None = None
    reason: str | None = None

    def used(self, use: AdapterUse | None) -> AdapterView:
        """The view with the use of its version filled in."""
        if use is None:
            return self
        state = "failed" if self.state == "loaded" and use.reason is not None else self.state
        return msgspec.structs.replace(self, state=state, **msgspec.structs.asdict(use))


class AdapterDetail(AdapterView, frozen=True, kw_only=True):
    """A view with the report on what the adapter changes in the base model, which is too large for lists.

    Attributes:
        report: None while it is being loaded.
    """

    report: dict[str, Any] | None = None

    @classmethod
    def of(cls, view: AdapterView, report: dict[str, Any] | None) -> AdapterDetail:
        return cls(**msgspec.structs.asdict(view), report=report)


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided at the engine's start.

    Attributes:
        dtype: of the weights and the K/V.
        page_size: tokens in a page of K/V, of which there are ``max_total_num_tokens``.
        lora_target_modules: None if LoRA is off, like ``max_lora_rank``.
        sampling_defaults: what requests of the OpenAI API get that do not say.
    """

    version: str
    model_path: str
    served_model_name: str
    architecture: str
    context_length: int
    max_running_requests: int
    max_queued_requests: int | None
    vocab_size: int
    hidden_size: int
    dtype: str
    device: str
    device_name: str | None
    attention_backend: str
    page_size: int
    max_total_num_tokens: int
    weights_bytes: int
    pool_bytes: int
    kv_bytes: int
    lora_enabled: bool
    max_lora_rank: int | None
    lora_target_modules: list[str] | None
    sampling_defaults: dict[str, int | float]
