"""What the cases of kernels share: tensors on their device, layers, and loops in float64."""

import os
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from tests.support import builders, oracles
from tests.support.builders import assert_close, make_batch, running_of
from tests.support.sampling import sampled
from tests.support.stat_maps import laid_out

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Shares of the largest value; the interpreter cuts off what bfloat16 doesn't hold.
SHARE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CASES = [
    (torch.float32, "contiguous"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "channels_last"),
    (torch.float16, "contiguous"),
]
OTHER_CASES = [(torch.bfloat16, "contiguous"), (torch.float16, "channels_last")]
EVERY_CASE = pytest.mark.parametrize(("dtype", "layout"), sampled(CASES + OTHER_CASES, len(CASES)))
PRIORS = [0.4, 0.1, 0.2, 0.3]
LABELS = [2, 0, -1, 0, 3, -1, 2]  # context 1 is absent


def _call_once_patched(function, *args, **kwargs):
    """Call what a kernel calls, without patching the language of Triton anew for each call.

    That stays patched, and takes the interpreter twenty times as long as most of the calls.
    """
    if function not in _PATCHED:
        _PATCHED.add(function)
        return _CALL(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


_PATCHED, _CALL = set(), InterpretedFunction.__call__
InterpretedFunction.__call__ = _call_once_patched
# Each sum of integers is else taken again in 64 bits. Those here are small; what offsets are where
# they are large is compared with the numbers that they have to be.
interpreter_builder.options = replace(interpreter_builder.options, sanitize_overflow=False)


def make_cn(*args, unknown="pooled", **settings):
    return builders.make_cn(*args, unknown=unknown, **settings).to(DEVICE)


def make_weighing(*args, **settings):
    return make_cn(*args, unknown="posterior", **settings)


def make_cnx(*args, **settings):
    return builders.make_cnx(*args, **settings).to(DEVICE)


def make_weighing_cnx(*args, **settings):
    return make_cnx(*args, unknown="posterior", **settings)


def as_labels(given):
    return None if given is None else torch.tensor(given, device=DEVICE)


def make(shape=(7, 3, 5, 3), dtype=torch.float32, layout="contiguous", offset=3.0):
    """Return x, whose channels have means as far apart as the offset, and a derivative."""
    pair = make_batch(shape, 0, offset, dtype), make_batch(shape, 1, 0.0, dtype)
    x, dy = (laid_out(t.to(DEVICE), layout) for t in pair)
    return x.requires_grad_(), dy


def widened(layer, x):
    """Return x and the parameters in float64, to differentiate, in the order of an oracle."""
    names = ("weight", "bias", "mu", "log_sigma")
    given = [p for name in names if (p := getattr(layer, name, None)) is not None]
    return given, [t.detach().double().requires_grad_() for t in (x, *given)]


def compare(layer, x, dy, labels, oracle, share=None, given=None, **settings):
    """Hold output and gradients of a layer to a loop in float64.

    The layer is given the labels, or what else is `given`.
    """
    share = share or SHARE[x.dtype]
    parameters, wide = widened(layer, x)
    y = layer(x, as_labels(labels) if given is None else given)
    expected = oracle(wide[0], labels or [-1] * len(x), *wide[1:], **settings)
    found = torch.autograd.grad(y, (x, *parameters), dy)
    wanted = torch.autograd.grad(expected, wide, dy.double(), allow_unused=True)
    assert y.stride() == found[0].stride() == x.stride()
    assert_close(y, expected, share)
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, torch.zeros_like(a) if b is None else b, share)


def compare_cn(layer, x, dy, labels, share=None, **settings):
    before = running_of(layer)
    priors = (layer.priors.double() / layer.priors.double().sum()).tolist()
    settings = {"running": before, "priors": priors, "training": True} | settings
    compare(layer, x, dy, labels, oracles.cn, share, **settings)
    after, found = before, running_of(layer)
    if settings["training"]:
        after = oracles.cn_update(
            x.detach().double(), labels, before, layer.momentum, settings.get("shrink", 0.0)
        )
    share = share or max(1e-6, 4 * torch.finfo(layer.running_mean.dtype).eps)
    assert_close(found.mean, after.mean, share)
    assert_close(found.var, after.var, share)
    assert found.tracked == after.tracked
