"""How much work something is, whatever the machine does meanwhile: the interpreter's instructions that it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

_T = TypeVar("_T")


def count_operations(work: Callable[[], _T]) -> tuple[int, _T]:
    """The bytecodes that a call executes in this thread, and what it returns. Loops inside C count as one."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = work()
    finally:
        sys.settrace(before)
    return count, result
