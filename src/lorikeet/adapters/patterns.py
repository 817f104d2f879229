"""Regular expressions that come with an adapter, matched in a process that may be stopped.

Only Python's ``re`` gives exactly what PEFT gives, look-ahead included, and nothing can stop it from within: a pattern
of twenty characters holds the interpreter's lock for hours. So it runs in a process of its own, with a limit on time
and on memory. Plain names and paths, which most adapters have, are matched at once.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from lorikeet.adapters import pattern_matcher
from lorikeet.adapters.pattern_matcher import PatternError
from lorikeet.errors import AdapterError
from lorikeet.masking import printable, shortened

# Processor time for all patterns of an adapter: a thousand of them take about a second for a thousand modules.
MAX_SECONDS = 3
MAX_BYTES = 512 << 20
# Wall time: the processor may be busy with others.
_PATIENCE_S = 60
# Answers that are remembered, so that an adapter that is read again and again does not start a process each time.
_MAX_REMEMBERED = 256

#: The field, how its patterns are matched (see ``pattern_matcher.answer``), and the patterns.
Question = tuple[str, str, Sequence[str]]

_remembered: OrderedDict[bytes, list[list[int]]] = OrderedDict()
_lock = threading.Lock()


def match_patterns(questions: Sequence[Question], paths: Sequence[str]) -> list[list[int]]:
    """The answers to several questions about the same paths; blocks for as long as it takes.

    Raises:
        AdapterError: names the field and the pattern that is wrong or exceeds the limits, and these.
    """
    if all(
        pattern_matcher.is_plain(pattern) for _, _, patterns in questions for pattern in patterns
    ):
        return [_answer(field, how, patterns, paths) for field, how, patterns in questions]
    request = json.dumps(
        {
            "questions": [[how, list(patterns)] for _, how, patterns in questions],
            "paths": list(paths),
            "seconds": MAX_SECONDS,
            "bytes": MAX_BYTES,
        }
    ).encode()
    key = hashlib.sha256(request).digest()
    with _lock:
        if key in _remembered:
            _remembered.move_to_end(key)
            return _remembered[key]
    answers = _ask(request, questions)
    with _lock:
        _remembered[key] = answers
        while len(_remembered) > _MAX_REMEMBERED:
            _remembered.popitem(last=False)
    return answers


def _answer(field: str, how: str, patterns: Sequence[str], paths: Sequence[str]) -> list[int]:
    try:
        return pattern_matcher.answer(how, patterns, paths)
    except PatternError as error:
        raise _refusal(field, error.pattern, error.reason) from None


def _ask(request: bytes, questions: Sequence[Question]) -> list[list[int]]:
    """Have a process match the patterns."""
    # Without the environment's and the site's modules: it starts in a hundredth of a second.
    command = [sys.executable, "-I", "-S", "-W", "ignore", pattern_matcher.__file__]
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise _too_much(questions) from None
    except OSError as error:
        raise AdapterError(f"the patterns cannot be matched: {error.strerror or error}") from None
    if done.returncode:
        raise _too_much(questions)
    reply = cast("dict[str, object]", json.loads(done.stdout))
    if "answers" in reply:
        return cast("list[list[int]]", reply["answers"])
    field = questions[cast("int", reply["question"])][0]
    raise _refusal(field, str(reply["pattern"]), str(reply["reason"]))


def _too_much(questions: Sequence[Question]) -> AdapterError:
    """The error if the process ended without an answer, so that nobody knows at which pattern."""
    field, pattern = next(
        (field, pattern)
        for field, _, patterns in questions
        for pattern in patterns
        if not pattern_matcher.is_plain(pattern)
    )
    return _refusal(
        field,
        pattern,
        f"(or one after it) takes too much time or memory; all patterns of an adapter may take {MAX_SECONDS} s and "
        f"{MAX_BYTES >> 20} MiB together",
    )


def _refusal(field: str, pattern: str, reason: str) -> AdapterError:
    return AdapterError(f"{field}: the pattern '{shortened(pattern)}' {printable(reason)}")
