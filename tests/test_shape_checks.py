"""The checks that all tests run under: what does not fit is refused, in every part of every kind of signature."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import beartype
import pytest
import torch
from jaxtyping import Float, TypeCheckError, config
from torch import Tensor

from kvtiers import Rotary
from shape_checks import checked

Pair = Float[Tensor, "rows width"]
Function = TypeVar("Function", bound=Callable[..., Any])


def shaped(function: Function) -> Function:
    """As the import hook would make it."""
    made: Function = checked(typechecker=beartype.beartype)(function)
    return made


@shaped
def beside(a: Pair, b: Pair, *, times: int = 1) -> Float[Tensor, "rows _"]:
    return torch.cat([a, b], 1).repeat(times, 1)


@shaped
def in_strings(a: "Pair", b: "Pair", *, times: int = 1) -> "Float[Tensor, 'rows _']":
    return torch.cat([a, b], 1).repeat(times, 1)


@shaped
def one_by_one(a: Pair, b: Pair, *, times: int = 1) -> Iterator[Tensor]:
    yield from [a, b] * times


@pytest.mark.parametrize("function", [beside, in_strings, one_by_one], ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        pytest.param((3, 3), torch.float32, {}, id="another number of rows"),
        pytest.param((2, 4), torch.float32, {}, id="another width"),
        pytest.param((2, 3, 1), torch.float32, {}, id="an axis more"),
        pytest.param((2, 3), torch.int64, {}, id="another dtype"),
        pytest.param((2, 3), torch.float32, {"times": 2.0}, id="no number"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(
    function: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, named: dict[str, Any]
) -> None:
    a = torch.zeros(2, 3)
    function(a, a)
    function(torch.zeros(5, 1), torch.zeros(5, 1))  # in a call of its own an axis may have another length
    with pytest.raises(TypeCheckError):
        function(a, torch.zeros(shape, dtype=dtype), **named)


@pytest.mark.parametrize("function", [beside, in_strings], ids=lambda function: function.__name__)
def test_a_result_that_does_not_fit_the_arguments_is_refused(function: Callable[..., Any]) -> None:
    a = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError):
        function(a, a, times=2)


def test_a_call_within_a_call_has_axes_of_its_own_and_does_not_change_those_outside() -> None:
    @shaped
    def outside(a: Pair, b: Pair, *, rows: int) -> Pair:
        beside(torch.zeros(5, 1), torch.zeros(5, 1))
        return torch.zeros(rows, a.shape[1])

    a = torch.zeros(2, 3)
    assert outside(a, a, rows=2).shape == (2, 3)
    with pytest.raises(TypeCheckError):
        outside(a, a, rows=5)


def test_checks_can_be_turned_off() -> None:
    config.update("jaxtyping_disable", True)
    try:
        assert beside(torch.zeros(2, 3), torch.zeros(2, 4)).shape == (2, 7)
    finally:
        config.update("jaxtyping_disable", False)


def test_functions_of_the_packages_are_checked() -> None:
    turn = Rotary([torch.ones(2)])
    turn.rotate(torch.zeros(1, 3, 4), torch.zeros(3, 1))
    with pytest.raises(TypeCheckError):
        turn.rotate(torch.zeros(1, 3, 4), torch.zeros(2, 1))
