"""Which of an adapter's patterns match which modules, by Python's ``re`` as PEFT does it.

Also a program: ``adapters/patterns.py`` runs this file as a process of its own, since ``re`` neither stops nor gives the
interpreter's lock away while it tries. So nothing but the standard library may be imported here.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Sequence

# Without any repetition or choice there is nothing to try again: such a pattern is matched in time linear in the path.
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")

# What compiling and matching raise because of the pattern.
_FAULTS = (re.error, ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


class PatternError(Exception):
    """A pattern cannot be used.

    Args:
        pattern: as the adapter has it.
        reason: what is wrong with it.
    """

    def __init__(self, pattern: str, reason: str) -> None:
        super().__init__(pattern, reason)
        self.pattern = pattern
        self.reason = reason


def is_plain(pattern: str) -> bool:
    """Whether ``pattern`` may be matched in any process: letters, digits, underscores and dots only."""
    return _PLAIN.fullmatch(pattern) is not None


def answer(how: str, patterns: Sequence[str], paths: Sequence[str]) -> list[int]:
    """One number for each path, -1 if no pattern matches it. The first that matches counts.

    Args:
        how: ``whole``: the pattern is the whole path, and the number is the pattern's place in the list;
            ``end``: it is the whole path or what follows a dot up to the end, and the number is its place;
            ``layer``: it is the name before a layer's number, which is the answer.

    Raises:
        PatternError: names the pattern.
    """
    found = [-1] * len(paths)
    open_paths = list(enumerate(paths))
    for place, pattern in enumerate(patterns):
        if not open_paths:
            break
        try:
            rest = _match(how, pattern, place, open_paths, found)
        except _FAULTS as error:
            reason = str(error) or type(error).__name__
            raise PatternError(pattern, f"is not a regular expression: {reason}") from None
        except MemoryError:
            raise PatternError(pattern, "needs too much memory") from None
        except TimeoutError as error:
            raise PatternError(pattern, str(error)) from None
        open_paths = rest
    return found


def _match(
    how: str, pattern: str, place: int, paths: list[tuple[int, str]], found: list[int]
) -> list[tuple[int, str]]:
    """Note the answers of one pattern; returns the paths that it leaves open."""
    if how != "layer" and is_plain(pattern):
        return _match_plain(how, pattern, place, paths, found)
    # The forms are PEFT's: check_target_module_exists and get_pattern_key.
    forms = {
        "whole": pattern,
        "end": rf"(.*\.)?({pattern})$",
        "layer": rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.",
    }
    compiled = re.compile(forms[how])
    match = compiled.fullmatch if how == "whole" else compiled.match
    rest: list[tuple[int, str]] = []
    for at, path in paths:
        hit = match(path)
        if hit is None:
            rest.append((at, path))
        elif how == "layer":
            number = hit["idx"]
            found[at] = -1 if number is None else int(number)
        else:
            found[at] = place
    return rest


def _match_plain(
    how: str, pattern: str, place: int, paths: list[tuple[int, str]], found: list[int]
) -> list[tuple[int, str]]:
    """As ``_match`` without compiling anything: what matches has the pattern's length."""
    size = len(pattern)
    rest: list[tuple[int, str]] = []
    for at, path in paths:
        at_boundary = len(path) == size or (how == "end" and path[-size - 1 : -size] == ".")
        end = path[-size:] if at_boundary else ""
        # A dot stands for any character.
        if end and all(a in (".", b) for a, b in zip(pattern, end, strict=True)):
            found[at] = place
        else:
            rest.append((at, path))
    return rest


def main() -> None:
    """Read questions from standard input and write answers to standard output, as JSON."""
    request = json.load(sys.stdin)
    seconds = request["seconds"]

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(
            f"takes too long: all patterns of an adapter may take {seconds} s together"
        )

    os.nice(10)  # whoever waits for a token goes first
    resource.setrlimit(resource.RLIMIT_AS, (request["bytes"], request["bytes"]))
    # re looks at signals while it matches. The second limit ends whatever does not.
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    hard = int(seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    answers: list[list[int]] = []
    try:
        for how, patterns in request["questions"]:
            answers.append(answer(how, patterns, request["paths"]))
    except PatternError as error:
        reply: dict[str, object] = {
            "question": len(answers),
            "pattern": error.pattern,
            "reason": error.reason,
        }
    else:
        reply = {"answers": answers}
    signal.setitimer(signal.ITIMER_PROF, 0)
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
