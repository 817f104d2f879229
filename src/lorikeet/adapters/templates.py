"""Chat templates that adapters bring."""

from __future__ import annotations

import atexit
from functools import lru_cache
from pathlib import Path

from lorikeet.adapters.files import read_small
from lorikeet.adapters.sources.source import TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from lorikeet.text.template_sandbox import Templates, TemplateSandbox

__all__ = ["Templates", "read_templates"]

_MAX_BYTES = 4 * 2**20


def read_templates(directory: Path) -> Templates:
    """The templates of an adapter's directory: ``chat_template.jinja``, or ``chat_template`` of ``tokenizer_config.json``.

    Raises:
        AdapterError: names the file that cannot be read, or whose template does not compile within its limits.
    """
    path = directory / TEMPLATE_FILE
    is_config = not path.exists()
    if is_config:
        path = directory / TOKENIZER_CONFIG_FILE
        if not path.exists():
            return {}
    return _sandbox().read(path, read_small(path, _MAX_BYTES), is_config=is_config)


@lru_cache(maxsize=1)
def _sandbox() -> TemplateSandbox:
    """One for this process: adapters are loaded in several threads, and the next load needs it again."""
    made = TemplateSandbox()
    atexit.register(made.close)
    return made
