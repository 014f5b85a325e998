"""What a converted model remembers of its conversion, and which context a caller means."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from normswap.errors import ContextError, ConversionError, not_converted
from normswap.graph.state import RECORD, state_of
from normswap.lifecycle.replaced_norm import original_of
from normswap.methods.base import Contexts, Method, get_method
from normswap.methods.unknown_labels import POLICIES
from normswap.report import Row, Verification
from normswap.util.arguments import check_choice, describe, listed, unknown_name
from normswap.util.changed_norms import computed_tensor, parametrized


@dataclass
class Record:
    """What a converted model remembers of its conversion; kept on its root.

    Attributes:
        method, options, contexts, placement: as asked.
        rows: what was considered, and what became of it.
        model: class name of the original.
        verification: how far the outputs differed.
        marks: of every tensor of the model that is not of a layer of the method, as it was at
            conversion; they tell what was trained since. Empty without values.
    """

    method: str
    options: Any
    contexts: Contexts
    rows: list[Row]
    model: str
    verification: Verification | None = None
    placement: str | None = None
    marks: dict[str, Any] = field(default_factory=dict)


def find_inside(model: nn.Module) -> tuple[nn.Module, Record] | None:
    """Return the first converted model that is, or is inside, a module, and its record."""
    found = ((m, vars(m)[RECORD]) for m in model.modules() if RECORD in vars(m))
    return next(found, None)


def find_root(model: nn.Module) -> tuple[nn.Module, Record]:
    """Return the converted model that a caller gave, perhaps compiled or in DDP, and its record."""
    root: Any = model
    while isinstance(root, DataParallel | DistributedDataParallel) or hasattr(root, "_orig_mod"):
        root = root.module if hasattr(root, "module") else root._orig_mod
    if isinstance(root, nn.Module):
        record: Record | None = vars(root).get(RECORD)
        if record is not None:
            return root, record
        inner = [name for name, module in root.named_modules() if RECORD in vars(module)]
        if inner:
            raise ConversionError(
                f"expected a converted model, got {type(root).__name__}, which holds one: pass its "
                f".{inner[0]}"
            )
        if state_of(root) is not None:
            raise ConversionError(
                f"expected a converted model, got a {type(root).__name__} that is a part of one: "
                "pass the whole, or specialize or revert that before the part is taken out of it "
                "(as PEFT's merge_and_unload does)"
            )
    raise not_converted(root)


def replaced_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that stand for a norm, by their first names."""
    added = set(map(id, inserted_layers(root).values()))
    return {
        name: module
        for name, module in root.named_modules()
        if original_of(module) is not None and id(module) not in added
    }


def inserted_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that were added, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in root.named_modules():
        state = state_of(module)
        for child in () if state is None else state.children():
            found[f"{name}.{child}".lstrip(".")] = module.get_submodule(child)
    return found


def method_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Return every layer of the method, replaced or inserted."""
    return replaced_layers(root) | inserted_layers(root)


def labelled_method(record: Record, what: str) -> Method:
    """Return the method of a conversion, which has contexts to do something with."""
    method = get_method(record.method)
    if not isinstance(method, Method) or not method.needs_context:
        raise ConversionError(f"method {record.method!r} has no contexts to {what}")
    return method


def weights_of(record: Record, method: Method, layer: nn.Module) -> Tensor:
    """Return the weights of a layer's contexts or components, (K,) or (K, C)."""
    weights = method.weights(layer)
    return record.contexts.priors if weights is None else weights


def check_parameters(layers: dict[str, nn.Module], written: bool = False) -> None:
    """Raise where a layer's parameter is computed before each forward, which reads another one.

    Where it is to be written, or kept by its name, also if it is computed whenever it is read.
    """
    for name, layer in layers.items():
        names = (*getattr(layer, "context_parameters", ()), "weight", "bias")
        remade = parametrized(layer) if written else {}
        if computed := computed_tensor(layer, names) or next((n for n in names if n in remade), ""):
            raise ConversionError(
                f"expected {name or 'the layer'}.{computed} as a parameter, got one that is "
                "computed from others; if pruned, call torch.nn.utils.prune.remove on it first, if "
                "parametrized, torch.nn.utils.parametrize.remove_parametrizations"
            )


def context_index(record: Record, context: str | int) -> int:
    """Return the index of a context, given by name or index."""
    names = record.contexts.names
    if isinstance(context, str):
        if context in names:
            return names.index(context)
        raise unknown_name("context", context, names)
    if isinstance(context, bool) or not isinstance(context, int):
        raise ContextError(f"expected a context by name or index, got {describe(context)}")
    if context not in range(len(names)):
        raise ContextError(
            f"expected a context in [0, {len(names)}), got {describe(context)}; the contexts are "
            f"{listed(names)}"
        )
    return context


def context_or_pooled(record: Record, context: str | int) -> int | None:
    """Return the index of a context, None for "pooled".

    Raises:
        ConversionError: a policy that is no fixed map, or "pooled" where a context is called so.
        UnknownNameError, ContextError: no such context.
    """
    names = record.contexts.names
    if not isinstance(context, str):
        return context_index(record, context)
    if context == "pooled" and "pooled" in names:
        raise ConversionError(
            f"'pooled' is a context here and also means the mixture of all; pass the index "
            f"{names.index('pooled')} for the context"
        )
    if context == "pooled":
        return None
    if context == "posterior" and "posterior" not in names:
        raise ConversionError(
            "unknown='posterior' weighs the contexts by each input, so that no plain norm equals "
            f"it; name 'pooled' or a context: {', '.join(names)}"
        )
    check_choice("context", context, (*names, "pooled"))
    return context_index(record, context)


def policy_of(unknown: str, names: Sequence[str]) -> str | int:
    """Return the policy for unknown labels as the layers take it: a context's name as its index."""
    check_choice("policy for unknown labels", unknown, (*POLICIES, *names))
    return unknown if unknown in POLICIES else names.index(unknown)
