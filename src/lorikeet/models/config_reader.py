"""Typed reading of JSON files that others wrote. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lorikeet.errors import ModelError
from lorikeet.fields import is_integer


def read_json(file: Path) -> dict[str, object]:
    """Parse a JSON file that holds one object.

    Raises:
        ModelError: it cannot be read or does not; names the file.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: holds {type(value).__name__}, not a JSON object")
    return value


class ConfigReader:
    """Typed access to a config's fields; null counts as absent. Errors name the file, the field and its value."""

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.config = config
        self.where = where

    def size(self, name: str, default: int | None = None, *, allow_zero: bool = False) -> int:
        value = self.optional_size(name, None, allow_zero=allow_zero)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{self.where}: {name} is missing")
        return value

    def optional_size(
        self, name: str, absent: int | None, *, allow_zero: bool = False
    ) -> int | None:
        """A positive integer; ``absent`` if the field is not there, None if it is null."""
        value = self.config.get(name, absent)
        if value is None:
            return None
        if not is_integer(value) or value < (0 if allow_zero else 1):
            raise self._refuse(name, "a positive integer")
        return value

    def positive(self, name: str, default: float) -> float:
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._refuse(name, "a number above 0")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._refuse(name, "true or false")
        return value

    def token(self, name: str, default: int | None) -> int | None:
        value = self.config.get(name, default)
        if value is not None and not is_integer(value):
            raise self._refuse(name, "an integer or null")
        return value

    def _refuse(self, name: str, allowed: str) -> ModelError:
        return ModelError(f"{self.where}: {name} is {self.config[name]!r}; allowed: {allowed}")
