"""One format for our logs, uvicorn's and Python's warnings."""

from __future__ import annotations

import logging
import re
import warnings

import pytest

from lorikeet.log import default_label, setup_logging

LINE = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (\w+) +(\w[\w ]*?)  (.*)$")


@pytest.fixture(autouse=True)
def restored():
    names = [None, "lorikeet", "uvicorn", "uvicorn.error", "uvicorn.access"]
    loggers = [logging.getLogger(name) for name in names]
    before = [(x.level, x.propagate, list(x.handlers)) for x in loggers]
    yield
    logging.captureWarnings(capture=False)
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.level, logger.propagate = level, propagate
        logger.handlers[:] = handlers
        logger.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]


def lines(capsys) -> list[tuple[str, ...]]:
    found = [LINE.match(line) for line in capsys.readouterr().err.splitlines()]
    return [match.groups() if match else () for match in found]


def test_one_line_with_level_process_and_message(capsys):
    setup_logging("info", "engine")
    logging.getLogger("lorikeet.x").info("loaded %d", 3)
    assert lines(capsys) == [("INFO", "engine", "loaded 3")]


def test_the_label_is_taken_from_the_process(capsys):
    assert default_label() == "server"
    setup_logging()
    logging.getLogger("lorikeet").info("hello")
    assert lines(capsys) == [("INFO", "server", "hello")]


def test_setting_up_again_replaces_the_setup(capsys):
    setup_logging("debug", "rank 1")
    setup_logging("warning", "rank 2")
    logging.getLogger("lorikeet").info("not shown")
    logging.getLogger("lorikeet").warning("shown once")
    assert lines(capsys) == [("WARNING", "rank 2", "shown once")]


@pytest.mark.parametrize("name", ["uvicorn", "uvicorn.error", "uvicorn.access"])
def test_uvicorn_speaks_through_ours(capsys, name):
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    setup_logging("info")
    logger.info("from uvicorn")
    assert lines(capsys) == [("INFO", "server", "from uvicorn")]


def test_libraries_are_quiet_until_something_is_wrong(capsys):
    setup_logging("debug")
    logging.getLogger("somelibrary").info("chatter")
    logging.getLogger("somelibrary").warning("trouble")
    logging.getLogger("lorikeet").debug("detail")
    assert [line[2] for line in lines(capsys)] == ["trouble", "detail"]


def test_warnings_are_logged(capsys):
    setup_logging("info")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.warn("old name", DeprecationWarning, stacklevel=1)
    logging.captureWarnings(capture=False)
    assert "old name" in capsys.readouterr().err


def test_other_handlers_stay():
    class Other(logging.Handler):
        pass

    other = Other()
    logging.getLogger().addHandler(other)
    setup_logging()
    assert other in logging.getLogger().handlers


def test_what_a_message_quotes_cannot_make_a_line_of_its_own(capsys):
    setup_logging("info", "engine")
    forged = "x\n2026-01-01 00:00:00.000 INFO    server  forged\x1b[31m"
    logger = logging.getLogger("lorikeet.x")
    logger.info("Adapter %s loaded", forged)
    try:
        raise ValueError(forged)
    except ValueError:
        logger.exception("loading %s failed", forged)
    text = capsys.readouterr().err
    found = [line for line in text.splitlines() if LINE.match(line)]
    assert len(found) == 2
    assert found[0].endswith(
        r"Adapter x\n2026-01-01 00:00:00.000 INFO    server  forged\x1b[31m loaded"
    )
    assert "\x1b" not in text
    assert "Traceback" in text
