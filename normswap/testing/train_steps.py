"""Checks of what training does to a converted model."""

import copy

import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from normswap.errors import ContractError
from normswap.lifecycle.record import method_layers
from normswap.lifecycle.training import freeze
from normswap.methods.layer import ContextLayer
from normswap.testing.case import (
    LABELS,
    Case,
    backward,
    check,
    require,
    require_close,
)
from normswap.testing.models import make_inputs


@check()
def check_gradients(case: Case) -> None:
    """Gradients of input and parameters are those that differences give; in training too."""
    for training in (False,) if case.method.stochastic else (False, True):
        model = case.trained().train(training)
        x = make_inputs(model).requires_grad_()
        names, values = zip(*model.named_parameters(), strict=True)
        buffers = copy.deepcopy(dict(model.named_buffers()))

        def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
            # Each call starts from the same statistics.
            tensors = copy.deepcopy(buffers) | dict(zip(names, values, strict=True))  # noqa: B023
            y: torch.Tensor = functional_call(model, tensors, (x,), case.given())  # noqa: B023
            return y

        gradcheck(run, (x, *values), fast_mode=True)


@check(needs_context=True)
def check_absent_contexts_and_single_samples(case: Case) -> None:
    """A training step reaches every context in the batch, of one sample too, and no other."""
    for place, model, x in case.each_trained(["ConvNet"]):
        y = case.run(model.train(), x, torch.tensor([0, 2, 0, 0, 0, 0]))
        require(bool(y.isfinite().all()), f"{place}: outputs are not finite")
        backward(y)
        for name, layer in model.named_modules():
            for key in layer.context_parameters if isinstance(layer, ContextLayer) else ():
                grad = layer.get_parameter(key).grad
                where = f"{place}: {name}.{key}"
                if grad is None:
                    raise ContractError(f"{where}: no gradient in a training step")
                absent, present = float(grad[1].abs().max()), float(grad[0].abs().max())
                require(absent == 0, f"{where}: the absent context has a gradient of {absent:.3g}")
                require(present > 0, f"{where}: a context in the batch has no gradient")
                require(bool(grad.isfinite().all()), f"{where}: gradients are not finite")


@check()
def check_every_parameter_trains(case: Case) -> None:
    """In training every parameter that requires a gradient gets a finite one."""
    model = case.trained().train()
    for seed in range(8):
        y = case.run(model, make_inputs(model, seed=seed), LABELS if case.labelled else None)
        backward(y)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        require(grad is not None and bool(grad.isfinite().all()), f"{name}: gradient {grad}")


@check()
def check_frozen_statistics(case: Case) -> None:
    """``freeze(stats="frozen")``: training leaves running statistics, and computes what eval does.

    A layer that names no ``stats_frozen`` is held in eval mode for it.
    """
    for place, model, x in case.each_trained(["ConvNet"]):
        freeze(model, "all", stats="frozen")
        expected = case.in_eval(model, x, LABELS if case.labelled else None)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        y = case.run(model.train(), x, LABELS if case.labelled else None)
        moved = [n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])]
        require(not moved, f"{place}: frozen, but moved: {', '.join(moved[:6])}")
        if not case.method.stochastic:
            require_close(y, expected, f"{place}: a frozen model in training", 1e-10)


@check()
def check_modes(case: Case) -> None:
    """Layers take part in ``train()`` and ``eval()``; in eval mode their state stays."""
    model = case.trained().train()
    layers = method_layers(model)
    require(all(m.training for m in layers.values()), "train() does not reach every layer")
    for layer in layers.values():
        layer.eval().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward(case.run(model, make_inputs(model), case.mixed))
    own = [n for n in before if any(n.startswith(f"{name}.") for name in layers)]
    moved = [n for n in own if not torch.equal(model.state_dict()[n], before[n])]
    require(not moved, f"layers in eval mode moved {moved} while the rest trains")


@check()
def check_checkpointing(case: Case) -> None:
    """Gradient checkpointing changes no output, gradient or statistic; labels are the forward's."""
    given = [LABELS, LABELS.flip(0)] if case.labelled else [None, None]
    for place, model, x in case.each_trained(["ConvNet"]):
        x.requires_grad_()
        twins = {flag: copy.deepcopy(model) for flag in (True, False)}
        for each, reentrant in ((model, None), *((twin, flag) for flag, twin in twins.items())):
            each.train()
            torch.manual_seed(0)
            outputs = [
                case.run(each, x, labels)
                if reentrant is None
                else checkpoint(case.run, each, x, labels, use_reentrant=reentrant)
                for labels in given
            ]
            backward(torch.stack(outputs))
        for reentrant, twin in twins.items():
            where = f"{place}, use_reentrant={reentrant}"
            pairs = zip(model.named_parameters(), twin.parameters(), strict=True)
            for (name, one), other in pairs:
                if one.grad is None or other.grad is None:
                    raise ContractError(f"{where}: {name} has no gradient in a training step")
                require_close(other.grad, one.grad, f"{where}: gradient of {name}", 1e-10)
            # Batch norms of torch, beside inserted layers, move their statistics twice.
            layers = zip(method_layers(model).items(), method_layers(twin).values(), strict=True)
            for (name, layer), copied in layers:
                buffers = zip(layer.named_buffers(), copied.buffers(), strict=True)
                for (key, buffer), found in buffers:
                    moved = f"{where}: {name}.{key}, which a layer moves unless keeps_stats()"
                    require_close(found, buffer, moved, 1e-10)
