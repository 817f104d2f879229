"""What may be configured: options as they are given, how they are read, and what depends on the device."""

from lorikeet.config.server_config import (
    OPTIONS,
    LoRAPath,
    ServerConfig,
    notes,
    parse_lora_paths,
    resolve,
)

__all__ = ["OPTIONS", "LoRAPath", "ServerConfig", "notes", "parse_lora_paths", "resolve"]
