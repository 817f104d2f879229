"""Lorikeet serves one base language model with many LoRA adapters, every sequence of a batch with its own.

The public names are loaded when they are first used, so that importing a part of the package (the HTTP process, the
command line) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorikeet.config import LoRAPath, ServerConfig
    from lorikeet.core.request import SamplingParams
    from lorikeet.errors import (
        AdapterError,
        AdapterNotFoundError,
        ConfigError,
        EngineDeadError,
        EngineFault,
        LoRADisabledError,
        LorikeetError,
        ModelError,
        OutOfMemoryError,
        RequestError,
        UnavailableError,
        UserError,
    )
    from lorikeet.llm import LLM

__all__ = [
    "LLM",
    "AdapterError",
    "AdapterNotFoundError",
    "ConfigError",
    "EngineDeadError",
    "EngineFault",
    "LoRADisabledError",
    "LoRAPath",
    "LorikeetError",
    "ModelError",
    "OutOfMemoryError",
    "RequestError",
    "SamplingParams",
    "ServerConfig",
    "UnavailableError",
    "UserError",
    "__version__",
]

_HOME = {
    "LLM": "lorikeet.llm",
    "LoRAPath": "lorikeet.config",
    "SamplingParams": "lorikeet.core.request",
    "ServerConfig": "lorikeet.config",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'lorikeet' has no attribute {name!r}")
    # What has no home of its own in the table is an exception.
    value = getattr(import_module(_HOME.get(name, "lorikeet.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
