"""A converted model gets more or fewer contexts: in layers, optimizer and record, or nowhere."""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normswap.errors import ConversionError
from normswap.graph.use_context import scopes_of
from normswap.lifecycle.optimizer_rows import Change, hand_over, plan_states
from normswap.lifecycle.record import Record, method_layers
from normswap.methods.base import Contexts, Method, get_method
from normswap.methods.layer_tensors import has_no_values
from normswap.util.distributed import refuse_sharded

Tables: TypeAlias = dict[str, dict[str, Tensor]]


def check_changeable(model: nn.Module, root: nn.Module, record: Record, how: str) -> Method:
    """Return the method of a model whose contexts can change.

    Args:
        model: as the caller gave it.
        root: the converted model in it.
        record: of its conversion.
        how: "add to" or "remove", for the message.

    Raises:
        ConversionError: a method without contexts, a model without values, or one that is wrapped
            or sharded.
    """
    method = get_method(record.method)
    if not isinstance(method, Method) or not method.needs_context:
        raise ConversionError(f"method {record.method!r} has no contexts to {how}")
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


def table_of(where: str, layer: nn.Module, key: str) -> Tensor:
    """Return a tensor of a layer that has a row for each context.

    Raises:
        ConversionError: it is computed from others.
    """
    if key not in layer._parameters and key not in layer._buffers:
        raise ConversionError(
            f"{where}.{key} is neither a parameter nor a buffer (parametrized?), whose rows could "
            "be changed"
        )
    table: Tensor = getattr(layer, key).detach()
    return table


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
                changed[old] = _changed_parameter(old, table, of_grad)
    plans = [] if optimizer is None else plan_states(optimizer, parameters, of_state, root)
    # Nothing below can fail.
    for where, layer in layers.items():
        for key, table in tables[where].items():
            old = layer._parameters.get(key)
            if old is not None:
                layer._parameters[key] = changed[old]
            else:
                layer._buffers[key] = table
        layer.__dict__.update(
            num_contexts=contexts.count,
            names=contexts.names,
            unknown=contexts.unknown,
            answering=contexts.answering,
        )
    hand_over(plans, changed)
    for scope in scopes_of(root):
        scope.num_contexts, scope.names = contexts.count, contexts.names
    record.contexts = contexts
    for row in record.rows:
        known = layers.get(row.layer or row.fqn)
        if known is not None and row.action in ("replaced", "inserted"):
            row.contexts = contexts.count
            row.parameters_after = sum(p.numel() for p in known.parameters())


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


def _changed_parameter(old: nn.Parameter, table: Tensor, of_grad: Change) -> nn.Parameter:
    new = nn.Parameter(table, old.requires_grad)
    new.__dict__.update(old.__dict__)
    new.grad = None if old.grad is None else of_grad(old.grad)
    return new
