"""Hand an optimizer parameters that have grown by a row, its state with them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError

Mix: TypeAlias = Callable[[Tensor], Tensor]
States: TypeAlias = dict[nn.Parameter, dict[str, Any]]
_Optimizer = torch.optim.Optimizer


def plan_growth(
    optimizer: Any, parameters: dict[nn.Parameter, str], mix: Mix
) -> list[tuple[Any, States]]:
    """Return the state an optimizer will have for parameters with one row more; change nothing.

    Args:
        optimizer: keeps its state by parameter, each tensor of it of the parameter's shape, of one
            number a row, of one number a column, or a scalar. It may wrap another that does.
        parameters: that will grow, with their names.
        mix: returns the row to append to a table (K, *): that of the context the new one is like.

    Returns:
        The optimizer and those it wraps, each with the states of the parameters it holds.

    Raises:
        ConversionError: an optimizer that holds none of them, or keeps state of another kind.
    """
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise ConversionError(
            f"expected optimizer= as a torch optimizer, got {type(optimizer).__name__}"
        )
    inner = [value for value in vars(optimizer).values() if isinstance(value, _Optimizer)]
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    if not optimized & parameters.keys():
        raise ConversionError(
            "expected optimizer= to hold parameters of this model's contexts, found none; pass the "
            "one that trains it, or leave it out and make a new one"
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in (optimizer, *inner)):
        raise ConversionError(
            "LBFGS keeps one flat history of all parameters, to which no row can be added; make it "
            "anew after add_context"
        )
    grown = {old: name for old, name in parameters.items() if old in optimized}
    return [
        (each, {p: _grow_state(each.state[p], p, grown[p], mix) for p in grown if p in each.state})
        for each in (optimizer, *inner)
    ]


def _grow_state(
    state: dict[str, Any], parameter: nn.Parameter, name: str, mix: Mix
) -> dict[str, Any]:
    return {key: _grow(value, parameter, f"{key!r} of {name}", mix) for key, value in state.items()}


def _grow(value: Any, parameter: nn.Parameter, where: str, mix: Mix) -> Any:
    if not isinstance(value, Tensor):
        if isinstance(value, list | tuple | dict) and value:
            raise ConversionError(f"cannot tell how the optimizer's state {where} grows: {value!r}")
        return value
    shape, wanted = tuple(value.shape), tuple(parameter.shape)
    rows = wanted[0]
    if shape == wanted and (rows > 1 or len(shape) > 1):
        return torch.cat([value, mix(value).to(value).unsqueeze(0)])
    if value.dim() == 0:
        return value
    per_row = rows > 1 and shape in ((rows,), (rows, 1))
    per_column = rows > 1 and shape in (wanted[1:], (1, *wanted[1:]), (1,))
    if per_row == per_column:
        raise ConversionError(
            f"cannot tell how the optimizer's state {where} grows with {where.split()[-1]} from "
            f"{wanted}: it is {shape}; make the optimizer anew after add_context"
        )
    return torch.cat([value, mix(value).to(value).unsqueeze(0)]) if per_row else value


def hand_over(plans: list[tuple[Any, States]], grown: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put grown parameters in place of the old ones, with the states planned."""
    for optimizer, states in plans:
        for group in optimizer.param_groups:
            group["params"][:] = [grown.get(p, p) for p in group["params"]]
        for old, state in states.items():
            # A wrapper may share its state with what it wraps.
            if optimizer.state.pop(old, None) is not None:
                optimizer.state[grown[old]] = state
