"""The embedded demo: a tiny Llama-shaped base model and the LoRA adapters trained on it.

The weights lie beside this file and come from `scripts/train_demo.py`. Nothing here imports torch
or transformers, so the command line can resolve ``--model-path demo`` and ``--lora-paths demo``
without loading either.
"""

from pathlib import Path

__all__ = ["NAME", "QUESTION", "adapter_paths", "is_demo", "model_path"]

NAME = "demo"
"""The word that stands for the embedded model, or for all of its adapters, in a path option."""

QUESTION = "List 3 countries and their capitals."
"""The seed question: sent as raw text, the base and every adapter answer it with true facts."""

_ROOT = Path(__file__).resolve().parent


def is_demo(name: str) -> bool:
    """Tell whether a path option means the embedded demo. A directory ``./demo`` is still a path."""
    return name == NAME


def model_path() -> Path:
    """Return the directory of the base model, in Hugging Face format."""
    return _ROOT / "base"


def adapter_paths() -> dict[str, Path]:
    """Return the directory of each adapter by name, sorted by name.

    Found from the directory rather than listed here, so a retrained set needs no change of code.
    """
    found = (_ROOT / "adapters").glob("*/adapter_config.json")
    return {config.parent.name: config.parent for config in sorted(found)}
