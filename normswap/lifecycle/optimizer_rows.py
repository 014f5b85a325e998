"""Hand an optimizer parameters with other rows than they had, its state with them."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.util.arguments import describe

Change: TypeAlias = Callable[[Tensor], Tensor]
States: TypeAlias = dict[nn.Parameter, dict[str, Any]]
_Optimizer = torch.optim.Optimizer


def plan_states(
    optimizer: Any, parameters: dict[nn.Parameter, str], change: Change, model: nn.Module
) -> list[tuple[Any, States]]:
    """Return the state an optimizer will have for parameters with other rows; change nothing.

    Args:
        optimizer: keeps its state by parameter, each tensor of it of the parameter's shape, of one
            number a row, of one number a column, or a scalar. It may wrap another that does.
        parameters: that will change, with their names.
        change: returns what a table (K, *) becomes.
        model: that they are of.

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
    # Contexts may have buffers alone.
    if not optimized & (parameters.keys() or set(model.parameters())):
        raise ConversionError(
            "expected optimizer= to hold parameters of this model's contexts, found none; pass the "
            "one that trains it, or leave it out and make a new one"
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in (optimizer, *inner)):
        raise ConversionError(
            "LBFGS keeps one flat history of all parameters, in which no row can change; make it "
            "anew afterwards"
        )
    held = {old: name for old, name in parameters.items() if old in optimized}
    return [
        (each, {p: _state(each.state[p], p, held[p], change) for p in held if p in each.state})
        for each in (optimizer, *inner)
    ]


def _state(
    state: dict[str, Any], parameter: nn.Parameter, name: str, change: Change
) -> dict[str, Any]:
    return {k: _changed(value, parameter, f"{k!r} of {name}", change) for k, value in state.items()}


def _changed(value: Any, parameter: nn.Parameter, where: str, change: Change) -> Any:
    if not isinstance(value, Tensor):
        if isinstance(value, list | tuple | dict) and value:
            raise ConversionError(
                f"cannot tell the rows of the optimizer's state {where}: {describe(value)}"
            )
        return value
    shape, wanted = tuple(value.shape), tuple(parameter.shape)
    rows = wanted[0]
    if shape == wanted and (rows > 1 or len(shape) > 1):
        return change(value)
    if value.dim() == 0:
        return value
    per_row = rows > 1 and shape in ((rows,), (rows, 1))
    per_column = rows > 1 and shape in (wanted[1:], (1, *wanted[1:]), (1,))
    if per_row == per_column:
        raise ConversionError(
            f"cannot tell the rows of the optimizer's state {where}, which is {shape} for a "
            f"parameter {wanted}; make the optimizer anew afterwards, without optimizer= here"
        )
    return change(value) if per_row else value


def hand_over(plans: list[tuple[Any, States]], new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put new parameters in place of the old ones, with the states planned."""
    for optimizer, states in plans:
        for group in optimizer.param_groups:
            group["params"][:] = [new.get(p, p) for p in group["params"]]
        for old, state in states.items():
            # A wrapper may share its state with what it wraps.
            if optimizer.state.pop(old, None) is not None:
                optimizer.state[new[old]] = state
