"""Back to a model of the original class and norms: `revert` and `specialize`."""

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.graph.not_copied import check_copyable
from normswap.graph.state import RECORD
from normswap.graph.surgery import Surgery, restore_forwards
from normswap.lifecycle.record import (
    Record,
    check_parameters,
    context_or_pooled,
    find_root,
    inserted_layers,
    method_layers,
    replaced_layers,
)
from normswap.lifecycle.replaced_norm import is_untouched, lacks_values, original_of, rebuild, write
from normswap.lifecycle.training import release
from normswap.methods.base import InsertedMethod, Method, get_method
from normswap.methods.layer_tensors import has_no_values
from normswap.methods.norm_values import PlainNorm
from normswap.util.arguments import check_flag, listed
from normswap.util.copies import copy_model
from normswap.util.distributed import refuse_sharded


@torch.inference_mode(False)  # else what is made here could never be trained
def revert(
    model: nn.Module,
    context: str | int | None = None,
    *,
    discard: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Return the model as it was before `convert`: its own class, forward and norms.

    A layer that still is what conversion made of its norm gives back exactly that norm, bit for
    bit. One that was trained gives the norm that computes what it computes in eval mode: for every
    context alike, or for the one asked for. Everything else, trained or not, stays as it is now;
    so do modes, hooks, device, dtype and what is frozen. A norm without an affine gets one where a
    context has one. Running statistics that `freeze` held move in training again. Parameters of
    the norms are new objects: make the optimizer anew.

    Args:
        model: a converted model.
        context: where contexts have moved apart, whose norms to take: a name, an index, or
            "pooled" for the one Gaussian of the mixture. Never guessed.
        discard: forget what the layers of the method learned instead: norms get the values they
            had at conversion, inserted layers are dropped.
        inplace: change `model` itself instead of a copy. A model that was a single norm comes back
            as a new object.

    Returns:
        The reverted model.

    Raises:
        ConversionError: not a converted model; contexts that differ, with none asked for; a layer
            that no plain norm equals (trained ACN, SelfNorm, a norm at the input). Nothing is
            changed then.
        UnknownNameError, ContextError: no such context.
    """
    root, record = find_root(model)
    refuse_sharded(root, "revert")
    check_flag("discard", discard)
    check_flag("inplace", inplace)
    if discard and context is not None:
        raise ConversionError("expected discard=True or a context=, got both")
    alike = context is None and record.contexts.count > 1
    index = 0 if context is None else _target(record, context)
    return _restore(root, record, index, alike, discard, inplace)


@torch.inference_mode(False)  # else what is made here could never be trained
def specialize(
    model: nn.Module, context: str | int | None = None, *, inplace: bool = False
) -> nn.Module:
    """Return a plain model of the original class that is the converted one for a context.

    In eval mode it computes what the converted model computes for that context, to float rounding;
    its norms are of their original classes, so that whatever folds, fuses, quantises or exports
    batch norm works on it. CrossNorm, the identity in eval, is dropped.

    Args:
        model: a converted model.
        context: a name, an index, or "pooled"; needed where there are several.
        inplace: change `model` itself instead of a copy.

    Returns:
        The plain model, modes as they were.

    Raises:
        ConversionError: not a converted model; no context where there are several; a map that
            depends on the input (trained ACN or SelfNorm, "posterior"), or a norm at the input.
        UnknownNameError, ContextError: no such context.
    """
    root, record = find_root(model)
    refuse_sharded(root, "specialize")
    check_flag("inplace", inplace)
    if context is None and record.contexts.count > 1:
        raise ConversionError(
            f"expected context= one of {_choices(record)}, got none; a plain norm has no contexts"
        )
    index = 0 if context is None else _target(record, context)
    return _restore(root, record, index, False, False, inplace)


def _target(record: Record, context: str | int) -> int | None:
    if not get_method(record.method).needs_context:
        raise ConversionError(
            f"method {record.method!r} has no contexts, got context={context!r}; leave it out"
        )
    return context_or_pooled(record, context)


def _choices(record: Record) -> str:
    return ", ".join(repr(name) for name in (*record.contexts.names, "pooled"))


def _restore(
    root: nn.Module, record: Record, index: int | None, alike: bool, discard: bool, inplace: bool
) -> nn.Module:
    """Put norms in place of the layers; the contexts have to agree if `alike`. See `revert`."""
    check_parameters(method_layers(root))
    if not inplace:
        check_copyable(root)
    target = root if inplace else copy_model(root)
    if not discard:
        _check_inserted(target, record)
    layers = replaced_layers(target)
    norms = {name: _norm(name, layers[name], record, index, alike, discard) for name in layers}
    if "" in norms:
        return norms[""]
    replaced = {id(layers[name]): norm for name, norm in norms.items()}
    with Surgery(target) as surgery:
        for parent, module in list(target.named_modules(remove_duplicate=False)):
            for leaf, child in list(module._modules.items()):
                if id(child) in replaced:
                    surgery.swap([f"{parent}.{leaf}".lstrip(".")], replaced[id(child)])
        surgery.replace_references(replaced)
    restore_forwards(target)
    release(target)
    for name in (RECORD, "no_weight_decay"):  # what `convert` put there
        target.__dict__.pop(name, None)
    return target


def _check_inserted(target: nn.Module, record: Record) -> None:
    """Raise if dropping an inserted layer would change the function."""
    method = get_method(record.method)
    kept = {}
    for name, layer in inserted_layers(target).items():
        why: str | None = "it normalises the input of the model, where the original has no norm"
        if has_no_values(layer):
            continue
        if isinstance(method, InsertedMethod):
            why = method.effect(layer)
        elif _is_untouched(layer, record):
            continue
        if why is not None:
            kept[name] = why
    if kept:
        raise ConversionError(
            f"no plain model of class {record.model} computes what this one does: at "
            f"{listed(kept, 5)}, {next(iter(kept.values()))}; revert(model, discard=True) "
            "drops what these layers do"
        )


def _is_untouched(layer: nn.Module, record: Record) -> bool:
    method = get_method(record.method)
    assert isinstance(method, Method)
    return is_untouched(layer, method, record.contexts, record.options)


def _norm(
    name: str, layer: nn.Module, record: Record, index: int | None, alike: bool, discard: bool
) -> nn.Module:
    norm, method = rebuild(layer), get_method(record.method)
    assert isinstance(method, Method)
    if discard and lacks_values(layer):
        raise ConversionError(
            f"expected {name or 'the layer'} to have had values at conversion for discard=True; it "
            "was on the meta device: leave discard= out to take what the layers compute now"
        )
    if discard or _is_untouched(layer, record):
        return norm
    try:
        plain = method.plain(layer, index if method.needs_context else None)
        if alike:
            plain = _common(layer, record, method)
    except ConversionError as error:
        raise ConversionError(
            f"cannot revert {name or 'the layer'} ({type(layer).__name__}): {error}"
            + ("" if alike else "; revert(model, discard=True) takes the norms of the conversion")
        ) from error
    write(norm, plain, layer)
    return norm


def _common(layer: nn.Module, record: Record, method: Method) -> PlainNorm:
    """Return the norm that every context has, up to rounding."""
    plains = [method.plain(layer, k) for k in range(record.contexts.count)]
    dtype = next(t.dtype for t in layer.parameters() if t.is_floating_point())
    bound = 8 * torch.finfo(dtype).eps

    def apart(one: Tensor | None, other: Tensor | None, offset: float) -> bool:
        if one is None or other is None:
            return one is not other
        return not torch.allclose(one + offset, other + offset, bound, 0.0, equal_nan=True)

    original = original_of(layer)
    assert original is not None
    offsets = {"var": getattr(layer, "eps", original.site.eps)}
    for field in ("mean", "var", "weight", "bias"):
        first, *others = (getattr(plain, field) for plain in plains)
        if any(apart(first, other, offsets.get(field, 0.0)) for other in others):
            raise ConversionError(
                f"its contexts have moved apart; say whose norms to take: context= one of "
                f"{_choices(record)}"
            )
    return plains[0]
