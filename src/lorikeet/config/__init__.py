"""What may be configured: the options as they are given, and the settings that they are resolved to."""

from lorikeet.config.lora_paths import LoRAPath
from lorikeet.config.resolve import notes, resolve
from lorikeet.config.server_config import LORA_SOURCES, OPTIONS, ServerConfig
from lorikeet.config.settings import HTTPSettings, LoRASettings, Settings
from lorikeet.config.values import Option, read_value

__all__ = [
    "LORA_SOURCES",
    "OPTIONS",
    "HTTPSettings",
    "LoRAPath",
    "LoRASettings",
    "Option",
    "ServerConfig",
    "Settings",
    "notes",
    "read_value",
    "resolve",
]
