"""Which launches may share a compiled kernel; a stand-in compiles, so that this runs without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorikeet.ops.triton.launcher import Launcher


class Function:
    """Notes what it compiles and what is launched."""

    arg_names = ("x_ptr", "y_ptr", "stride", "count", "eps", "D", "B")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*operands: Any, **constants: Any) -> Any:
            self.compiled.append(operands)
            return self

        def launch(*arguments: Any) -> None:
            self.launched.append((grid, arguments))

        return launch if len(grid) == 3 else run


@pytest.fixture
def function() -> Function:
    return Function()


@pytest.fixture
def launcher(function: Function) -> Launcher:
    made = Launcher(function, ("count",), ("y_ptr",))
    made._is_compiled = True
    return made


X = torch.zeros(64)
CONSTANTS = {"D": 64, "num_warps": 4, "B": 32}


def launch(launcher: Launcher, *changed: Any, **constants: Any) -> None:
    operands = [X, X, 64, 3, 0.5]
    operands[: len(changed)] = changed
    launcher[(7,)](*operands, **(CONSTANTS | constants))


def test_a_second_launch_compiles_nothing(launcher: Launcher, function: Function) -> None:
    launch(launcher)
    y = torch.ones(64)
    launch(launcher, y, X, 128, 4, 0.25)
    assert len(function.compiled) == 1
    ((grid, arguments),) = function.launched
    assert grid == (7, 1, 1)
    assert arguments[0] is y
    assert arguments[2:] == (128, 4, 0.25, 64, 32), "constants in the order of the parameters"


@pytest.mark.parametrize(
    "changed",
    [
        (X.half(),),
        (X[1:],),
        (None,),
        (X, None),
        (X, X, 1),
        (X, X, 65),
        (X, X, 2**31),
        (X, X, 64, 2**40),
        (X, X, 64, 3, None),
    ],
    ids=str,
)
def test_what_needs_a_kernel_of_its_own(
    launcher: Launcher, function: Function, changed: tuple[Any, ...]
) -> None:
    if changed[0] is None:
        changed = (X, None)
    launch(launcher)
    launch(launcher, *changed)
    assert len(function.compiled) == 2
    launch(launcher, *changed)
    assert len(function.compiled) == 2


@pytest.mark.parametrize("constants", [{"D": 128}, {"num_warps": 8}])
def test_constants_and_options_are_compiled_in(
    launcher: Launcher, function: Function, constants: dict[str, int]
) -> None:
    launch(launcher)
    launch(launcher, **constants)
    assert len(function.compiled) == 2


@pytest.mark.parametrize("count", [1, 16, 5])
def test_a_varying_integer_is_not_looked_at(
    launcher: Launcher, function: Function, count: int
) -> None:
    launch(launcher)
    launch(launcher, X, X, 64, count)
    assert len(function.compiled) == 1


def test_a_shifting_pointer_is_not_looked_at(launcher: Launcher, function: Function) -> None:
    launch(launcher)
    launch(launcher, X, X[1:])
    assert len(function.compiled) == 1
    launch(launcher, X, X[1:].half())
    assert len(function.compiled) == 2, "its type is"


def test_the_interpreter_launches_by_itself(function: Function) -> None:
    launcher = Launcher(function)
    launch(launcher)
    launch(launcher)
    assert len(function.compiled) == 2
