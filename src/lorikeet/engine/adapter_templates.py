"""Chat templates that adapters bring, and how the HTTP process, which renders messages, hears of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lorikeet.engine.chat import check_template
from lorikeet.engine.tokenizer_files import named_templates
from lorikeet.errors import AdapterError, ModelError
from lorikeet.lora.files import read_small
from lorikeet.lora.source import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE

Templates = dict[str, str]
"""Name -> Jinja source; the usual one is ``default``."""

_MAX_BYTES = 4 * 2**20


def read_templates(directory: Path) -> Templates:
    """The templates of an adapter's directory: ``chat_template.jinja``, or ``chat_template`` of ``tokenizer_config.json``.

    Raises:
        AdapterError: names the file that cannot be read, or whose template does not compile.
    """
    path = directory / TEMPLATE_FILE
    if path.exists():
        templates = {"default": _read_text(path)}
    elif (path := directory / TOKENIZER_CONFIG_FILE).exists():
        templates = _read_config(path)
    else:
        return {}
    for name, source in templates.items():
        try:
            check_template(source)
        except ValueError as error:
            named = "" if name == "default" else f" {name!r}"
            raise AdapterError(
                f"{path}: the chat template{named} cannot be used: {error}"
            ) from error
    return templates


def _read_text(path: Path) -> str:
    try:
        return read_small(path, _MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path} is not UTF-8: {error}") from error


def _read_config(path: Path) -> Templates:
    try:
        config: object = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} should hold a JSON object")
    try:
        return named_templates(cast(dict[str, Any], config).get("chat_template"), path)
    except ModelError as error:
        raise AdapterError(str(error)) from error


class TemplateNews:
    """Names that came or went since the news was last taken."""

    def __init__(self) -> None:
        self._changed: dict[str, Templates | None] = {}

    def load(self, name: str, templates: Mapping[str, str]) -> None:
        """``name`` means an adapter with these templates from now on."""
        self._changed[name] = dict(templates)

    def unload(self, name: str) -> None:
        """``name`` means nothing any more."""
        self._changed[name] = None

    def take(self) -> dict[str, Templates | None]:
        """Name -> its templates; None if it is gone."""
        changed, self._changed = self._changed, {}
        return changed
