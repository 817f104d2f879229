"""The module names of ``--lora-target-modules``."""

from __future__ import annotations

from lorikeet.errors import ConfigError

# PEFT's names of the modules of the supported families; the engine checks them against the model it has loaded.
TARGET_MODULES = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("embed_tokens", "lm_head"),
)
# Names of packed projections that users of the field write for their parts.
_PACKED_TARGETS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def check_targets(targets: tuple[str, ...] | None) -> None:
    """Refuse names that no supported family has.

    Raises:
        ConfigError: lists the known ones.
    """
    if targets is None or targets == ("all",):
        return
    if not targets:
        raise ConfigError("--lora-target-modules is empty; allowed: module names, or all")
    if "all" in targets:
        raise ConfigError("--lora-target-modules: all stands alone; leave the other names out")
    known = (*TARGET_MODULES, *_PACKED_TARGETS)
    if unknown := [name for name in targets if name not in known]:
        raise ConfigError(
            f"--lora-target-modules: unknown {', '.join(unknown)}; known: {', '.join(known)}, or all alone"
        )


def expand_targets(targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The names with those of packed projections replaced by their parts'."""
    if targets is None:
        return None
    parts = [part for name in targets for part in _PACKED_TARGETS.get(name, (name,))]
    return tuple(dict.fromkeys(parts))
