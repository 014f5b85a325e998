"""A converted model gets more or fewer contexts: in layers, optimizer and record, or nowhere."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normswap.errors import ConversionError
from normswap.graph.scope.use_context import scopes_of
from normswap.lifecycle.record import Record, labelled_method, method_layers
from normswap.methods.base import Contexts, Method
from normswap.methods.layer_tensors import has_no_values
from normswap.util.arguments import describe
from normswap.util.distributed import refuse_sharded

Change: TypeAlias = Callable[[Tensor], Tensor]
States: TypeAlias = dict[nn.Parameter, dict[str, Any]]
Tables: TypeAlias = dict[str, dict[str, Tensor]]
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
    every = with_wrapped(optimizer)
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    # Contexts may have buffers alone.
    if not optimized & (parameters.keys() or set(model.parameters())):
        raise ConversionError(
            "expected optimizer= to hold parameters of this model's contexts, found none; pass the "
            "one that trains it, or leave it out and make a new one"
        )
    if any(isinstance(each, torch.optim.LBFGS) for each in every):
        raise ConversionError(
            "LBFGS keeps one flat history of all parameters, in which no row can change; make it "
            "anew afterwards"
        )
    named = {old: name for old, name in parameters.items() if old in optimized}

    def state_of(each: Any, p: nn.Parameter) -> dict[str, Any]:
        state = each.state[p].items()
        return {k: _changed(value, p, f"{k!r} of {named[p]}", change) for k, value in state}

    return [(each, {p: state_of(each, p) for p in named if p in each.state}) for each in every]


def with_wrapped(optimizer: Any) -> list[Any]:
    """Return an optimizer and those it wraps, as accelerate's and timm's Lookahead do."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, _Optimizer)]
    return [optimizer, *(each for value in inner for each in with_wrapped(value))]


def _changed(value: Any, parameter: nn.Parameter, where: str, change: Change) -> Any:
    if type(value) not in (Tensor, nn.Parameter):
        empty = isinstance(value, list | tuple | dict) and not value
        # Preconditioners, and tensors that are quantised, have classes of their own.
        if not (empty or value is None or isinstance(value, int | float | str)):
            raise ConversionError(
                f"cannot tell the rows of the optimizer's state {where}, {describe(value)}; make "
                "the optimizer anew afterwards, without optimizer= here"
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


def check_changeable(model: nn.Module, root: nn.Module, record: Record, how: str) -> Method:
    """Return the method of a model whose contexts can change; `how` is a word for the message."""
    method = labelled_method(record, how)
    if has_no_values(root):
        raise ConversionError(
            "cannot change the contexts of a model without values (meta device); load them first"
        )
    if any(isinstance(m, DataParallel | DistributedDataParallel) for m in model.modules()):
        raise ConversionError(
            "cannot change the contexts of a model wrapped for parallel training, which holds on "
            "to the parameters it was given; give its .module instead and wrap that anew"
        )
    refuse_sharded(root, "change the contexts of")
    return method


def changed_tables(
    root: nn.Module,
    method: Method,
    like: int | None,
    share: float,
    change: Callable[[Tensor, Tensor], Tensor],
) -> Tables:
    """Return what has a row for each context, after ``change(table, row of one more context)``.

    The tensors that a further context has a row of are those that each context has one of.
    """
    tables: Tables = {}
    for where, layer in method_layers(root).items():
        tables[where] = {}
        for key, row in method.added_rows(layer, like, share).items():
            if key not in layer._parameters and key not in layer._buffers:
                raise ConversionError(
                    f"{where}.{key} is neither a parameter nor a buffer (parametrized?), whose "
                    "rows could be changed"
                )
            table: Tensor = getattr(layer, key).detach()
            if table.shape[1:] != row.shape:
                wanted = tuple(table.shape[1:])
                raise ConversionError(
                    f"expected a row {wanted} for {where}.{key}, got {tuple(row.shape)}"
                )
            tables[where][key] = change(table, row)
    return tables


def change_contexts(
    root: nn.Module,
    record: Record,
    contexts: Contexts,
    tables: Tables,
    optimizer: torch.optim.Optimizer | None,
    of_state: Change,
    of_grad: Change,
) -> None:
    """Give a model other contexts, and new parameters in place of those with rows for them.

    Args:
        root: the converted model.
        record: of its conversion.
        contexts: those from now on.
        tables: what has a row for each of them, by the names of layer and tensor.
        optimizer: of the parameters among them, if there is one to follow.
        of_state: returns what its state for one of them, (K, *) or (K,), becomes.
        of_grad: returns what a gradient becomes.

    Raises:
        ConversionError: a parameter, or the optimizer's state of it, that cannot follow. Nothing
            is changed then.
    """
    layers = method_layers(root)
    parameters: dict[nn.Parameter, str] = {}
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for where, layer in layers.items():
        for key, table in tables[where].items():
            old = layer._parameters.get(key)
            if old is not None:
                _check_parameter(old, f"{where}.{key}")
                parameters[old] = f"{where}.{key}"
                new = changed[old] = nn.Parameter(table, old.requires_grad)
                for name, value in vars(old).items():  # AdaHessian keeps its state there
                    rows = isinstance(value, Tensor) and value.shape == old.shape
                    new.__dict__[name] = of_state(value) if rows else value
                new.grad = None if old.grad is None else of_grad(old.grad)
    plans = [] if optimizer is None else plan_states(optimizer, parameters, of_state, root)
    # Nothing below can fail.
    for where, layer in layers.items():
        for key, table in tables[where].items():
            own: dict[str, Any] = layer._parameters if key in layer._parameters else layer._buffers
            own[key] = changed.get(own[key], table)
        kept = {name: getattr(contexts, name) for name in ("names", "unknown", "answering")}
        layer.__dict__.update(num_contexts=contexts.count, **kept)
    for each, states in plans:
        for group in each.param_groups:
            group["params"][:] = [changed.get(p, p) for p in group["params"]]
        for p, state in states.items():
            # A wrapper may share its state with what it wraps.
            if each.state.pop(p, None) is not None:
                each.state[changed[p]] = state
    for scope in scopes_of(root):
        scope.num_contexts, scope.names = contexts.count, contexts.names
    record.contexts = contexts
    for row in record.rows:
        changed_layer = layers.get(row.layer or row.fqn)
        if changed_layer is not None and row.action in ("replaced", "inserted"):
            row.contexts = contexts.count
            row.parameters_after = sum(p.numel() for p in changed_layer.parameters())


def _check_parameter(parameter: nn.Parameter, name: str) -> None:
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise ConversionError(
            f"{name} has hooks, which a new parameter would not run; remove them first"
        )
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        raise ConversionError(
            f"expected {name} as a plain parameter, got {type(parameter.data).__name__}; change "
            "contexts before tensors become subclasses"
        )
