"""What all kernels take for granted about their operands.

A kernel gets pointers and strides of rows; an operand of another shape would be read beyond its end without a word.
"""

from __future__ import annotations

import torch


def check_rows(shape: torch.Size | None, *operands: torch.Tensor | None) -> None:
    """Refuse operands that a kernel would misread; None stands for an absent one.

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
