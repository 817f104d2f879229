"""One logging setup for every process: time, level, process and rank, message; one line each.

    2026-11-22 12:00:01.123 INFO  engine  Memory: weights 12.1 MB, adapter pool 3.0 MB, 65536 KV tokens

Modules log through ``logging.getLogger(__name__)``; the entry point of a process calls :func:`setup_logging` once.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import sys
from typing import Any, TextIO

from lorikeet.masking import printable

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(process_label)-6s  %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

# Loggers that obey --log-level. Everything else is a library and speaks only when something is wrong.
_OURS = ("lorikeet", "uvicorn", "uvicorn.error", "uvicorn.access")


class _LineFormatter(logging.Formatter):
    """One line per record, whatever a message quotes: a line break in an adapter's name must not begin a line that looks
    like ours. Lines of a traceback are indented for the same reason."""

    def format(self, record: logging.LogRecord) -> str:
        # What another handler has made of the exception is not ours.
        own = copy.copy(record)
        own.exc_text = None
        return super().format(own)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base's name
        # Python's warnings end with a line break.
        record.message = printable(record.message.rstrip("\n"))
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return "\n".join(
            f"    {printable(line)}" for line in super().formatException(ei).splitlines()
        )


class _LineHandler(logging.StreamHandler[TextIO]):
    """The handler that :func:`setup_logging` owns; its type tells it from handlers of others."""


def default_label() -> str:
    """The label of this process from its name: ``lorikeet-engine`` is the engine, the main process the server."""
    name = multiprocessing.current_process().name
    return "server" if name == "MainProcess" else name.removeprefix("lorikeet-")


def setup_logging(level: str = "info", label: str | None = None) -> None:
    """Send the logs of Lorikeet, uvicorn and Python's warnings to stderr in one format.

    Calling it again replaces the setup. Handlers of others on the root logger stay.

    Args:
        level: debug, info, warning, error or critical.
        label: shown in each line; None takes it from the name of the process.
    """
    handler = _LineHandler(sys.stderr)
    defaults = {"process_label": label or default_label()}
    handler.setFormatter(_LineFormatter(FORMAT, DATE_FORMAT, defaults=defaults))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _LineHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    number = logging.getLevelNamesMapping()[level.upper()]
    root.setLevel(max(number, logging.WARNING))
    for name in _OURS:
        logger = logging.getLogger(name)
        # uvicorn installs handlers of its own on import paths that configure it; one line per event is enough.
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(number)
    logging.captureWarnings(capture=True)
