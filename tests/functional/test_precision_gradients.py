"""Gradients in float32 of inputs far from zero, against float64.

Judged by torch's own layers on the same data: batch norm where statistics are a batch's or given,
instance norm where they are an instance's. Far from zero a layer may lose as many digits as these
do, and FEW times that; where it had fewer near zero to begin with, as many as there.
"""

import copy
import functools

import pytest
import torch
from torch import nn

import normswap
from normswap.functional import stat_maps, tables
from normswap.functional.style import cross_norm
from normswap.methods import acn_layer, cn_layer, selfnorm_gate
from normswap.methods.selfnorm_gate import Gate
from tests.support.builders import random_

FEW = 5
MEANS = [30.0, 1000.0]
SHAPE = (12, 16, 6, 7)
LABELS = torch.arange(SHAPE[0]) % 3
MIXED = torch.where(torch.arange(SHAPE[0]) % 4 == 0, -1, LABELS)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Cross(nn.Module):
    """CrossNorm with its draw given."""

    def __init__(self, instances: int, content: bool = False, style: bool = False) -> None:
        super().__init__()
        box = torch.tensor([[1, 1], [5, 6]])
        count = SHAPE[0] if instances == 2 else SHAPE[1]
        self.settings = torch.arange(count).roll(1), instances
        self.boxes = box if content else None, box if style else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cross_norm(x, *self.settings, *self.boxes)


class SharedMoments(nn.Module):
    """A synchronised layer in one process, computing as it does among several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for module in (acn_layer, cn_layer, selfnorm_gate):
                patch.setattr(module, "sum_over", lambda group: lambda t: t)
            return self.layer(*args)


def synced(layer):
    for module in layer.modules():
        if hasattr(module, "synced"):
            module.synced = True
    return SharedMoments(layer)


def context_norm(unknown="pooled", kind=normswap.ContextNorm):
    return kind(SHAPE[1], 3, unknown=unknown)


learned_norm = functools.partial(context_norm, kind=normswap.ContextNormX)
instance_norm = functools.partial(context_norm, kind=normswap.ContextInstanceNorm)
gates = functools.partial(normswap.SelfNorm, SHAPE[1])
mixture = functools.partial(normswap.AdaptiveContextNorm, SHAPE[1], 3)

# Name: what makes the layer, its labels, whether statistics are an instance's.
LAYERS = {
    "cn": (context_norm, LABELS, False),
    "cn, pooled": (context_norm, MIXED, False),
    "cn, posterior": (lambda: context_norm("posterior"), MIXED, True),
    "cn, another context": (lambda: context_norm(1), MIXED, False),
    "cn, synced": (lambda: synced(context_norm()), LABELS, False),
    "cn-x": (learned_norm, LABELS, False),
    "cn-x, pooled": (learned_norm, MIXED, False),
    "cn-x, posterior": (lambda: learned_norm("posterior"), MIXED, True),
    "instance norm": (instance_norm, LABELS, True),
    "instance norm, pooled": (instance_norm, MIXED, True),
    "selfnorm": (gates, None, True),
    "selfnorm, two gates": (lambda: gates(2), None, True),
    "selfnorm, synced": (lambda: synced(gates()), None, True),
    "acn": (mixture, None, False),
    "acn, position": (lambda: mixture(assignment="position"), None, False),
    "acn, instance": (lambda: mixture(assignment="instance"), None, True),
    "acn, instance, synced": (lambda: synced(mixture(assignment="instance")), None, True),
    "acn, learned": (lambda: mixture(statistics="learned"), None, False),
    "crossnorm": (lambda: Cross(2), None, True),
    "crossnorm, channels": (lambda: Cross(1), None, True),
    "crossnorm, boxes": (lambda: Cross(2, content=True, style=True), None, True),
}
UNLABELLED = {
    "cn, pooled": (context_norm, None, False),
    "cn, posterior": (lambda: context_norm("posterior"), None, True),
    "cn-x, pooled": (learned_norm, None, False),
    "cn-x, posterior": (lambda: learned_norm("posterior"), None, True),
}


def batch(mean, layout="contiguous", apart=0.5):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator) * torch.linspace(0.8, 1.5, 16).reshape(-1, 1, 1)
    x = x + apart * LABELS.reshape(-1, 1, 1, 1) + mean
    cotangent = torch.randn(SHAPE, generator=generator)
    return [t.contiguous(memory_format=FORMATS[layout]) for t in (x, cotangent)]


@torch.no_grad()
def prepared(layer, x):
    """Return the layer as training on such data leaves it."""
    groups = [x[k == LABELS] for k in range(3)]
    mean, var = (torch.stack([f(g, (0, 2, 3)) for g in groups]) for f in (torch.mean, torch.var))
    whole = {"running_mean": mean.mean(0), "running_var": var.mean(0)}
    rows = {"running_mean": mean, "running_var": var, "mu": mean, "log_sigma": var.log() / 2}
    for seed, module in enumerate(layer.modules()):
        module.fresh = False
        for name, t in (*module.named_parameters(recurse=False), *module.named_buffers("", False)):
            if name in ("weight", "bias", "bn_weight", "bn_bias"):
                random_(t, seed, 0.5, 1.5)
            elif name in rows and not isinstance(module, Gate):
                t.copy_((rows if t.dim() == 2 else whole)[name])
        if isinstance(module, Gate):
            module.running_mean.copy_(module.weight[:, 0] * x.mean((0, 2, 3)))
    return layer


def gradients(layer, x, cotangent, labels):
    x = x.clone().requires_grad_()
    y = layer(x) if labels is None else layer(x, labels)
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(y, [x, *parameters.values()], cotangent, allow_unused=True)
    return {n: t for n, t in zip(["x", *parameters], found, strict=True) if t is not None}


def errors(layer, x, cotangent, labels=None, wide=None):
    """Return each gradient's error in float32 as a share of it: root mean squares."""
    wide = copy.deepcopy(layer).double() if wide is None else wide
    narrow = gradients(layer, x, cotangent, labels)
    exact = gradients(wide, x.double(), cotangent.double(), labels)
    return {n: float((narrow[n] - t).norm() / t.norm()) for n, t in exact.items()}


@functools.cache
def yardstick(mean, training, instances, apart=0.5):
    """Return the largest error among the gradients of torch's own layer."""
    x, cotangent = batch(mean, apart=apart)
    kind = nn.InstanceNorm2d if instances else nn.BatchNorm2d
    layer = prepared(kind(SHAPE[1], affine=True), x).train(training)
    return max(errors(layer, x, cotangent).values())


def check(case, mean, training, layout, apart=0.5):
    make, labels, instances = case
    found = {}
    for where in (0.0, mean):
        x, cotangent = batch(where, layout, apart)
        found[where] = errors(prepared(make(), x).train(training), x, cotangent, labels)
    allowed = yardstick(mean, training, instances, apart)
    for name, error in found[mean].items():
        assert error <= FEW * max(allowed, found[0.0][name]), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_as_exact_as_those_of_torchs_own_layers(name, mean, layout, training):
    check(LAYERS[name], mean, training, layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", UNLABELLED)
def test_gradients_of_batches_without_a_label(name, mean, layout):
    check(UNLABELLED[name], mean, False, layout)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_plain_formulas(name, mean, training, monkeypatch):
    """As a compiler reads them."""
    for module in (tables, stat_maps):
        monkeypatch.setattr(module, "uses_kernels", lambda x: False)
    check(LAYERS[name], mean, training, "contiguous")


@pytest.mark.parametrize("name", UNLABELLED)
def test_gradients_with_contexts_far_apart(name):
    check(UNLABELLED[name], 1000.0, False, "contiguous", apart=300.0)
