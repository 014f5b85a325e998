"""Rows of contexts that a step has nothing for stay as they are: `keep_absent_rows`."""

from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, expect_module
from normswap.lifecycle.context_rows import with_wrapped
from normswap.lifecycle.record import check_parameters
from normswap.methods.layer import ContextLayer


class KeptRows:
    """What `keep_absent_rows` put on an optimizer; `remove` takes it off again."""

    def __init__(self, optimizers: list[torch.optim.Optimizer], layers: list[ContextLayer]) -> None:
        self._layers = layers
        self._saved: list[tuple[ContextLayer, dict[nn.Parameter, dict[str, Tensor]]]] = []
        self._handles = [o.register_step_pre_hook(self._before) for o in optimizers]
        self._handles += [o.register_step_post_hook(self._after) for o in optimizers]

    def remove(self) -> None:
        """Let all rows move again in every step."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        optimized = {p for group in optimizer.param_groups for p in group["params"]}
        self._saved = []
        for layer in self._layers:
            kept = {p: _rows(optimizer, p) for p in _tables(layer) if p in optimized}
            copies = {p: {k: t.clone() for k, t in rows.items()} for p, rows in kept.items()}
            self._saved.append((layer, copies))

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Not before the step: a closure computes the gradients in it.
        decays = {p: g.get("weight_decay") for g in optimizer.param_groups for p in g["params"]}
        for layer, saved in self._saved:
            grads = [p.grad for p in _tables(layer) if p.grad is not None]
            if not grads:
                continue
            absent = torch.stack([(g == 0).flatten(1).all(1) for g in grads]).all(0)
            for p, before in saved.items():
                for key, now in _rows(optimizer, p).items():
                    # Rows of what this step made would, but for the decay, still be as made.
                    made = _as_made(now, before[""]) if decays[p] else now
                    old = before.get(key, made)
                    mask = absent.to(now.device).reshape(-1, *[1] * (now.dim() - 1))
                    now.copy_(torch.where(mask, old, now))
        self._saved = []


def keep_absent_rows(optimizer: torch.optim.Optimizer, model: nn.Module) -> KeptRows:
    """Keep an optimizer from moving the rows of contexts that a step has no sample of.

    Momentum and weight decay act on whole parameters, so that a context's mean or affine would go
    on moving in steps of other contexts alone, as that of a module of its own would not. From now
    on a step puts such rows back, in the parameter and in what the optimizer keeps for each of its
    elements or rows (``momentum_buffer``, ``exp_avg``, ``exp_avg_sq``). With SGD each context then
    trains as if it had an optimizer of its own. With Adam too, but that the steps its bias
    correction asks for are counted for a parameter, not for a row, as by torch's SparseAdam: a
    context that comes late takes other first steps.

    A context is absent from a layer where the gradient of its rows, in all parameters with rows for
    contexts, is exactly zero: several backward passes before a step add up, `GradScaler` and
    clipping change nothing, and processes that average their gradients agree. A sample without a
    label has a part in the rows its policy uses. The host waits for nothing.

    Args:
        optimizer: of torch, or derived from its class; it holds parameters of the model's contexts.
            Of one that wraps another, as accelerate's and timm's Lookahead do, the steps of the
            wrapped one count; what Lookahead averages between them, it averages in all rows.
        model: a converted model, or a module that holds one.

    Returns:
        A handle, whose ``remove()`` ends it. The optimizer's state dict stays as it is; neither it
        nor a pickle has the setting.

    Raises:
        ConversionError: no such optimizer; one that keeps no state for each row (LBFGS), or holds
            no parameter of a context; or a parameter that is pruned or parametrized. In a step: a
            state that is no plain tensor.
    """
    expect_module(model)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConversionError(
            f"expected optimizer= as a torch optimizer, got {type(optimizer).__name__}"
        )
    # A wrapper has no state of its own, and its steps may run no hooks.
    wrapped = [each for each in with_wrapped(optimizer) if len(with_wrapped(each)) == 1]
    if any(isinstance(each, torch.optim.LBFGS) for each in wrapped):
        raise ConversionError(
            "LBFGS keeps one flat history of all parameters, in which no row can be kept; "
            "use an optimizer that keeps its state by parameter"
        )
    for each in wrapped:
        if not getattr(type(each).step, "hooked", False):  # by torch.optim.Optimizer.__init__
            raise ConversionError(
                f"expected optimizer= whose steps run torch's hooks, got {type(each).__name__}, "
                "whose do not; call super().__init__() in its class"
            )
    named = {name: m for name, m in model.named_modules() if isinstance(m, ContextLayer)}
    check_parameters(dict(named), written=True)
    layers = list(named.values())
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    if not any(p in optimized for layer in layers for p in _tables(layer)):
        raise ConversionError(
            "expected optimizer= to hold parameters of this model's contexts, found none; pass the "
            "one that trains it, made after normswap.convert"
        )
    return KeptRows(wrapped, layers)


def _as_made(state: Tensor, before: Tensor) -> Tensor:
    """Return what a step made of a state, had decay not moved it.

    That is zeros, or where the optimizer keeps a copy of the parameter, as MADGRAD, the copy.
    """
    if state.shape != before.shape:
        return torch.zeros_like(state)
    before = before.to(state)
    return torch.where(state == before, before, 0)


def _tables(layer: ContextLayer) -> list[nn.Parameter]:
    return [layer.get_parameter(name) for name in layer.context_parameters]


def _rows(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter, as "", and what is kept for each of its elements or rows, by name."""
    state = {k: v for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
    rows = ((len(p),), (len(p), 1)) if len(p) > 1 else ()
    fit = {k: v for k, v in state.items() if v.dim() and (v.shape == p.shape or v.shape in rows)}
    for key, value in fit.items():
        if type(value) not in (Tensor, nn.Parameter):
            raise ConversionError(
                f"cannot keep rows of the optimizer's state {key!r}, a {type(value).__name__}; use "
                "an optimizer whose states are plain tensors, or end keep_absent_rows by .remove()"
            )
    return {"": p.detach(), **fit}
