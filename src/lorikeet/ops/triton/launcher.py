"""Launching a compiled kernel without asking each time what to compile.

Triton binds arguments, works out what it specialises on and looks the kernel up at every launch: 50 to 150 microseconds
of Python for kernels of 10 to 30 parameters, more than most of ours take on the device. A step that runs eagerly has
hundreds of launches. Here the same question is answered by one look-up in a table of our own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

# Triton compiles anew for an integer that is 1, that 16 divides, or that needs 64 bits, and for a pointer that is not
# a multiple of 16. A key that tells these apart never launches a kernel that was compiled for something else.
_ALIGNMENT = 16
_LARGEST_INT32 = 2**31 - 1


def cdiv(value: int, size: int) -> int:
    """How many pieces of ``size`` cover ``value``. (Triton's own may be called in kernels, too, and takes 8 us here.)"""
    return -(-value // size)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below ``value``; 1 for 0."""
    return 1 << max(0, value - 1).bit_length()


class Launcher:
    """A kernel: ``launcher[grid](*operands, **constants)``, like a function of ``triton.jit``.

    Operands are given by position and in order, everything else by name: the kernel's ``constexpr`` parameters, none left
    out, and Triton's own options such as ``num_warps``.

    Args:
        function: what ``triton.jit`` made.
        varying: names of integers that Triton was told not to specialise on.
        shifting: likewise of pointers whose alignment it was told not to look at.
    """

    def __init__(
        self, function: Any, varying: tuple[str, ...] = (), shifting: tuple[str, ...] = ()
    ) -> None:
        self._function = function
        self._is_compiled = isinstance(function, JITFunction)  # else Triton's interpreter
        self._names: list[str] = list(function.arg_names)
        self._varying = frozenset(self._names.index(name) for name in varying)
        self._shifting = frozenset(self._names.index(name) for name in shifting)
        # Compiled kernels, each with the constants that its launcher takes behind the operands.
        self._kernels: dict[tuple[object, ...], tuple[Any, list[object]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        if not self._is_compiled:
            return self._function[grid]
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *operands: Any, **constants: Any) -> None:
        key = self._key(operands, constants)
        found = self._kernels.get(key)
        if found is None:
            rest = [constants[name] for name in self._names[len(operands) :]]
            self._kernels[key] = self._function[grid](*operands, **constants), rest
            return
        kernel, rest = found
        kernel[(*grid, 1, 1)[:3]](*operands, *rest)

    def _key(self, operands: tuple[Any, ...], constants: dict[str, object]) -> tuple[object, ...]:
        parts: list[object] = [operands[0].device]
        for index, operand in enumerate(operands):
            if isinstance(operand, torch.Tensor):
                parts.append(operand.dtype)
                if index not in self._shifting:
                    parts.append(operand.data_ptr() % _ALIGNMENT == 0)
            elif isinstance(operand, int):
                parts.append(operand > _LARGEST_INT32)
                if index not in self._varying:
                    parts.append(operand == 1)
                    parts.append(operand % _ALIGNMENT == 0)
            else:
                parts.append(type(operand))
        return (*parts, *constants.values())


def kernel(*varying: str, shifting: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel that is launched from Python (one that other kernels call is a plain ``triton.jit``).

    Args:
        varying: integers that change from step to step: no compilation of their own for 1 or for a multiple of 16.
        shifting: pointers into a tensor's middle, at another place in each step: no compilation of their own for a
            multiple of 16 bytes.
    """

    def declare(function: Callable[..., Any]) -> Launcher:
        compiled = triton.jit(
            do_not_specialize=list(varying), do_not_specialize_on_alignment=list(shifting)
        )
        return Launcher(compiled(function), varying, shifting)

    return declare


def check_rows(shape: torch.Size | None, *operands: torch.Tensor | None) -> None:
    """Refuse operands that a kernel would misread; None stands for an absent one.

    A kernel gets pointers and strides of rows; an operand of another shape would be read beyond its end without a word.

    Args:
        shape: what every operand has to have; None if they differ.

    Raises:
        ValueError: an operand has another shape, or its last dimension is not contiguous.
    """
    for operand in operands:
        if operand is None:
            continue
        if shape is not None and operand.shape != shape:
            raise ValueError(f"an operand is {tuple(operand.shape)} beside {tuple(shape)}")
        if operand.stride(-1) != 1 and operand.shape[-1] > 1:
            raise ValueError(
                f"the last dimension of an operand {tuple(operand.shape)} has stride {operand.stride(-1)}, not 1"
            )
