"""What of a converted model is trained, and how: parameter groups, and freezing."""

from fnmatch import fnmatch
from functools import partial
from inspect import getattr_static
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from normswap.errors import ConversionError, expect_module, not_converted
from normswap.lifecycle.record import find_inside
from normswap.lifecycle.replaced_norm import original_of
from normswap.methods.layer import NormLayer
from normswap.sites import looks_like_norm
from normswap.util.arguments import check_choice, check_number, describe
from normswap.util.batches import FROZEN_MODE
from normswap.util.changed_norms import parametrized, sources_of
from normswap.util.extras import need
from normswap.util.select import Selector, find_modules

_HUGE = 1e300


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    norm_lr: float | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups for any optimizer: weight decay spares norms, contexts and biases.

    The usual rule, to spare parameters of one dimension, misses those that have a row for each
    context; decay would pull a context's mean or log standard deviation towards zero. What the
    model itself exempts (timm's ``no_weight_decay()``) is spared too. timm's own factories,
    ``create_optimizer_v2(model, ...)``, find the same exemptions on a converted model.

    Args:
        model: a converted model, or a module that holds one; any other model works too.
        lr: learning rate.
        weight_decay: of all that is not spared.
        norm_lr: learning rate of all norm layers, the inserted ones and the contexts' parameters
            included; `lr` by default.
        layer_decay: factor, in (0, 1], on the learning rates from each layer of the model to the
            one below; the layers are timm's, for a model of timm or in order of the parameters.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``; parameters that do not require a
        gradient are in none.

    Raises:
        ConversionError: a number out of range, or no parameter that requires a gradient.
        NormswapError: `layer_decay` without timm.
    """
    expect_module(model)
    for name, value in (("lr", lr), ("norm_lr", norm_lr), ("weight_decay", weight_decay)):
        if not (_is_number(value) and value >= 0) and not (name == "norm_lr" and value is None):
            raise ConversionError(f"expected {name}= of 0 or more, got {describe(value)}")
    if layer_decay is not None:
        check_number("layer_decay", layer_decay, 0, 1, open_low=True)
    norms = {id(p) for p in norm_parameters(model).values()}
    spared = _spared_names(model)
    scales: dict[int, float] = {}
    if layer_decay is not None:
        optim = need("timm.optim", "recipes", "layer_decay=, whose layers are timm's,")
        layered = optim.param_groups_layer_decay(model, layer_decay=layer_decay)
        scales = {id(p): group["lr_scale"] for group in layered for p in group["params"]}
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        flat = parameter.ndim <= 1 or name.endswith(".bias")
        exempt = flat or id(parameter) in norms or any(fnmatch(name, s) for s in spared)
        own_rate = norm_lr is not None and id(parameter) in norms
        kind = (own_rate, scales.get(id(parameter), 1.0), exempt)
        groups.setdefault(kind, []).append(parameter)
    if not groups:
        raise ConversionError(
            f"no parameter of {type(model).__name__} requires a gradient; see normswap.freeze"
        )
    found = []
    for (own_rate, scale, exempt), parameters in groups.items():
        rate = norm_lr if own_rate and norm_lr is not None else lr
        # A rate that is a tensor stays the caller's, which may be changed between steps.
        rate = rate if scale == 1 else rate * scale
        decay = 0.0 if exempt else weight_decay
        found.append({"params": parameters, "lr": rate, "weight_decay": decay})
    return found


def freeze(
    model: nn.Module, train: str = "norms", stats: str = "update", *, also: Selector = None
) -> None:
    """Choose what trains and whether running statistics move, in place, before the optimizer.

    Args:
        model: a converted model, or a module that holds one.
        train: which parameters require a gradient; all others do not. "norms": those of every
            norm layer, replaced, inserted or left as it was (LayerNorm and others included);
            "contexts": only those with a row for each context (for ACN, each component); "all".
            A new head is no norm; see `also`.
        stats: "update": running statistics move in training mode; "frozen": every layer that has
            them, batch norms that were not replaced included, normalises with them and leaves
            them, whatever ``model.train()`` says. Layers made from a FrozenBatchNorm never move.
            A batch norm that is frozen so reports ``training=False``; dropout inside it follows the
            model's mode.
        also: modules of which every parameter is trained too, such as a new head, "fc": globs,
            types and so on, as `select` of `convert` takes them, on the names in `model`.

    ``freeze(model, train="all", stats="update")`` takes it all back. The setting is part of the
    model: copies and pickles keep it, a state dict and `save` do not. `revert` and `specialize` end
    ``stats="frozen"``: in the plain model every norm follows ``train()`` and ``eval()``.

    Raises:
        UnknownNameError: a word that is none of these.
        ConversionError: no converted model; one that DistributedDataParallel wrapped already,
            which would go on waiting for the gradients it knew; an `also` that matches no module;
            or nothing left to train.
    """
    check_choice("train=", train, ("norms", "contexts", "all"))
    check_choice("stats=", stats, ("update", "frozen"))
    expect_module(model)
    layers = [m for m in model.modules() if isinstance(m, NormLayer)]
    if not layers and find_inside(model) is None:
        raise not_converted(model)
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ConversionError("expected freeze before DistributedDataParallel wraps the model")
    if train == "norms":
        chosen = {id(p) for p in norm_parameters(model).values()}
    elif train == "contexts":
        chosen = {id(p) for m in layers for n in m.context_parameters for p in sources_of(m, n)}
    else:
        chosen = {id(p) for p in model.parameters()}
    if not chosen:
        raise ConversionError(
            f"nothing to train with train={train!r}: no layer has such parameters; "
            'use "norms" or "all"'
        )
    if also is not None:
        named = find_modules("also", also, model)
        more = {id(p) for m in named for p in m.parameters()}
        if named and not more:
            raise ConversionError(f"expected also= of modules with parameters, got {also!r}")
        chosen |= more
    for parameter in model.parameters():
        # A quantised or integer parameter takes no gradient.
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in chosen)
    for module in model.modules():
        # Layers of other packages need not know the setting; they are held in eval mode.
        if hasattr(type(module), "stats_frozen"):
            module.stats_frozen = stats == "frozen"  # type: ignore[assignment]
        elif _has_statistics(module):
            _hold(module, stats == "frozen")


def release(model: nn.Module) -> None:
    """Let the norms of a model that are kept in eval mode follow the model's mode again."""
    for module in model.modules():
        _hold(module, False)


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of every norm layer of a model by name, inserted layers included.

    In place of one that is parametrized, those that it is computed from.
    """
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if is_ours(module) or looks_like_norm(module):
            found |= {
                f"{prefix}.{n}".lstrip("."): p for n, p in module.named_parameters(recurse=False)
            }
            for name, part in parametrized(module).items():
                inside = f"{prefix}.parametrizations.{name}".lstrip(".")
                found |= dict(part.named_parameters(inside))
    return found


def exempt_norms(model: nn.Module) -> None:
    """Let a converted model's ``no_weight_decay()`` name the parameters of its norms too.

    timm's factories for optimizers ask it.
    """
    # A partial is copied and pickled with the module it refers to; a closure would not be.
    model.__dict__["no_weight_decay"] = partial(_no_weight_decay, model)


def _is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value can be a learning rate; some optimizers take it as a tensor."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_meta and value.is_floating_point()
    return isinstance(value, int | float) and not isinstance(value, bool) and value < _HUGE


def _no_weight_decay(model: nn.Module) -> set[str]:
    own = getattr_static(type(model), "no_weight_decay", None)
    names = set() if own is None else set(own.__get__(model, type(model))())
    norms = set(norm_parameters(model))
    # A compiled model asks this one, but has its parameters under other names.
    return names | norms | {f"_orig_mod.{name}" for name in norms}


def _spared_names(model: nn.Module) -> list[str]:
    """Return what the model and its parts exempt from decay; patterns, as timm takes them."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    ]


def is_ours(module: nn.Module) -> bool:
    """Return whether a module is a layer of this package, or of a method of the user's own."""
    ours = isinstance(module, NormLayer) or original_of(module) is not None
    return ours or type(module).__module__.startswith("normswap.")


def _has_statistics(module: nn.Module) -> bool:
    names = (name for name, _ in module.named_buffers(recurse=False))
    keeps = any(name.startswith("running_") for name in names)
    return keeps and (looks_like_norm(module) or is_ours(module))


def _hold(module: nn.Module, frozen: bool) -> None:
    """Keep a norm in eval mode whatever mode it is set to, or let it go again."""
    is_frozen = FROZEN_MODE in vars(module)
    if frozen and not is_frozen:
        mode = module.training
        module.__dict__["train"] = partial(_train_children, module)
        module.train(mode)
    elif is_frozen and not frozen:
        del module.__dict__["train"]
        module.training = module.__dict__.pop(FROZEN_MODE)


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for a frozen norm's ``train``: its dropout and activation follow the mode."""
    type(module).train(module, mode)
    module.__dict__[FROZEN_MODE] = mode
    module.training = False
    return module
