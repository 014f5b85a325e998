"""Checks of what a converted model computes."""

import copy

import torch
from torch import nn

from normswap.api import convert, summary
from normswap.graph.scope.use_context import use_context
from normswap.lifecycle.unknown import set_unknown
from normswap.methods.base import InsertedMethod
from normswap.methods.layer import ContextLayer
from normswap.testing.case import (
    LABELS,
    MIXED,
    NAMES,
    ORDERS,
    Case,
    Labels,
    check,
    replaces,
    require,
    require_close,
    require_equal,
)
from normswap.testing.models import Frozen, make_inputs, make_model

# Float32 rounding of the converted model, in units of that of the original.
_FEW = 4
_POLICIES = ("pooled", "posterior", "b", "error")


@check(keeps_function=True)
def check_function_is_kept(case: Case) -> None:
    """In eval mode the converted model computes what the original did, for every context."""
    for name in case.models:
        base = make_model(name, torch.float32)
        x = make_inputs(base)
        wide = make_model(name, torch.float64)(x.double())
        bound = _FEW * float((base(x) - wide).detach().abs().max())
        exact = isinstance(case.method, InsertedMethod)
        model = case.convert(base)
        for unknown in _POLICIES if case.labelled else (None,):
            if unknown is not None:
                set_unknown(model, unknown)
            labels = list[Labels]([0, 1, 2, LABELS])
            for label in labels if unknown == "error" else case.labels:
                y = case.in_eval(model, x, label)
                error = float((y - (base(x) if exact else wide)).detach().abs().max())
                require(
                    error <= (0 if exact else bound),
                    f"{name}, context {label}, unknown={unknown!r}: outputs differ by {error:.3g}, "
                    f"allowed {0 if exact else bound:.3g}",
                )


@check(keeps_function=True)
def check_input_gradient_is_kept(case: Case) -> None:
    """In eval mode the gradient of the input is the original's."""
    for base, x in case.bases():
        x.requires_grad_()
        (expected,) = torch.autograd.grad(base(x).square().sum(), x)
        y = case.run(case.convert(base), x, MIXED if case.labelled else None)
        (actual,) = torch.autograd.grad(y.square().sum(), x)
        require_close(actual, expected, type(base).__name__, 1e-10)


@check(keeps_function=False)
def check_a_change_of_function_is_said(case: Case) -> None:
    """A method that does not keep the function converts, and the summary says how far it is off."""
    base = make_model(case.models[0])
    x = make_inputs(base)
    model = case.convert(base, example_inputs=x)
    said = str(summary(model))
    require("does not keep the function" in said, f"the summary says: {said.splitlines()[:4]}")
    require(bool(case.in_eval(model, x).isfinite().all()), "outputs are not finite")


@check(replaces)
def check_what_was_around_the_norm_stays(case: Case) -> None:
    """Mode, hooks, freezing, fused activation and the other state-dict keys of a norm stay."""
    base = Frozen().train()
    if case.refusal(base):
        return
    base.first.eval().requires_grad_(False)
    calls: list[str] = []
    for module, name in ((base.fused.act, "act"), (base.first, "first")):
        module.register_forward_hook(lambda *given, name=name: calls.append(name))
    model = case.convert(base, inplace=True, verify=False)
    case.run(model, make_inputs(base), LABELS if case.labelled else None)
    require(sorted(calls) == ["act", "first"], f"expected each called once, got {calls}")
    modes = [model.get_submodule(n).training for n in ("fused", "first", "second")]
    require(modes == [True, False, True], f"expected modes [True, False, True], got {modes}")
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    wrong = [n for n, r in required.items() if r == n.startswith(("fused", "first"))]
    require(not wrong, f"requires_grad is not as it was for {wrong}")
    lost = {"conv.weight", "conv.bias"} - model.state_dict().keys()
    require(not lost, f"state-dict keys lost: {lost}")


@check()
def check_a_batch_equals_its_samples(case: Case) -> None:
    """In eval mode a sample's output depends on no other sample, nor on its place in the batch."""
    for where, model, x in case.each_trained():
        for labels in ORDERS if case.labelled else [None]:
            each = [None] * len(x) if labels is None else list(torch.split(labels, 1))
            alone = [case.in_eval(model, x[n : n + 1], each[n]) for n in range(len(x))]
            together = case.in_eval(model, x, labels)
            require_close(together, torch.cat(alone), f"{where}, labels {labels}")


@check(stochastic=False)
def check_the_order_of_samples_is_theirs(case: Case) -> None:
    """Samples in another order give the same outputs in that order, in training too."""
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    for where, model, x in case.each_trained(sorted({"ConvNet", "Windows"} & set(case.models))):
        labels = case.mixed
        case.run(model.train(), x, labels)  # measures which rows are whose, for the copy too
        expected = case.run(copy.deepcopy(model), x, labels)[order]
        actual = case.run(model, x[order], None if labels is None else labels[order])
        require_close(actual, expected, where)


@check(needs_context=True)
def check_contexts_differ_once_trained(case: Case) -> None:
    """Contexts whose statistics and affine differ give other outputs, and the summary says so."""
    for name in case.models:
        model = case.convert(make_model(name))
        for row in summary(model).rows:
            before = row.divergence or 0.0
            require(before < 1e-6, f"{name}: {row.fqn}: divergence {before} before training")
        model = case.trained(name)
        x = make_inputs(model)
        outputs = [case.in_eval(model, x, k) for k in range(len(NAMES))]
        for k in range(len(NAMES)):
            apart = float((outputs[k] - outputs[k - 1]).abs().amax(1).min())
            require(apart > 1e-4, f"{name}: contexts {k} and {k - 1} differ by {apart:.3g} only")
        for row in summary(model).rows:
            found = row.divergence
            require(found is None or found > 1e-4, f"{name}: {row.fqn}: divergence {found}")


@check(needs_context=True)
def check_labels_in_scope_are_labels_given(case: Case) -> None:
    """`normswap.use_context` does what ``context=`` does, and ``context=`` wins over it."""
    for where, model, x in case.each_trained():
        expected, flipped = (case.in_eval(model, x, m) for m in (MIXED, MIXED.flip(0)))
        with use_context(model, MIXED):
            require_equal(case.in_eval(model, x), expected, f"{where}: labels in scope")
            y = case.in_eval(model, x, MIXED.flip(0))
            require_equal(y, flipped, f"{where}: labels given within a scope")
        unknown = case.in_eval(model, x, torch.full((len(x),), -1))
        require_equal(case.in_eval(model, x), unknown, f"{where}: no labels, all unknown")


@check(needs_context=True)
def check_contexts_have_no_order(case: Case) -> None:
    """Contexts numbered otherwise, their rows with them, give the same outputs."""
    model, order = case.trained(), torch.tensor([1, 2, 0])
    x = make_inputs(model)
    expected = case.in_eval(model, x, LABELS)
    for layer in model.modules():
        if isinstance(layer, ContextLayer):
            for key, tensor in layer.state_dict().items():
                if key in layer.context_parameters or key == "priors" or tensor.dim() == 2:
                    tensor.copy_(tensor[order])
    require_close(case.in_eval(model, x, torch.argsort(order)[LABELS]), expected, "renamed")


@check(needs_context=True, keeps_function=True)
def check_one_context_is_the_base_layer(case: Case) -> None:
    """With one context no label is needed, and the model is the original, in training too."""
    base = make_model(dtype=torch.float64)
    x = make_inputs(base)
    model = convert(base, case.method.name, **dict(case.options))
    for label in (None, 0, NAMES.index("a")):
        require_close(case.in_eval(model, x, label), base(x), f"context {label}")
    require(bool(model.train()(x).isfinite().all()), "in training: outputs are not finite")


@check()
def check_dtype_and_memory_format_stay(case: Case) -> None:
    """Outputs have the dtype and memory format that the original's have; under autocast too."""
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    if case.refusal(base):
        base[1] = nn.InstanceNorm2d(4)
    x = torch.randn(6, 3, 8, 8)
    labels = MIXED if case.labelled else None
    for dtype in (torch.float32, torch.bfloat16):
        cast = copy.deepcopy(base).to(dtype)
        model, last = case.convert(cast), x.to(dtype, memory_format=torch.channels_last)
        y = case.in_eval(model, x.to(dtype), labels)
        require(y.dtype == dtype, f"expected {dtype}, got {y.dtype}")
        if case.method.keeps_function:
            require_close(y, base(x), f"{dtype}", 1e-5 if dtype == torch.float32 else 0.05)
        for training in (False, True):
            z = case.run(model.train(training), last, None if labels is None else LABELS)
            kept = z.is_contiguous(memory_format=torch.channels_last)
            require(kept, f"channels last became strides {z.stride()}, training={training}")
            require(z.dtype == dtype, f"expected {dtype}, got {z.dtype}, training={training}")
    model = case.convert(base)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = case.in_eval(model, x, labels), base(x)
    require(found.dtype == expected.dtype, f"autocast: {found.dtype}, not {expected.dtype}")
    if case.method.keeps_function:
        require_close(found, expected, "autocast", 0.05)
