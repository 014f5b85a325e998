"""One layer of each method on the GPU against the same in float64 on the CPU."""

import copy
import functools

import pytest
import torch
from torch import nn

from normswap.methods.registry import get_method
from normswap.testing.case import MIXED
from tests.gpu.steps import (
    EVERY,
    EVERY_LABELLED,
    LAYOUTS,
    SORTED,
    TRAINING,
    case_of,
    labels_for,
    options_of,
    require_near,
    values_of,
    widen,
    without_gradients,
)
from tests.support.builders import make_batch, trained_norm

pytestmark = pytest.mark.gpu
DIMS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
IMAGES = [(12, 64, 28, 28), (18, 37, 7, 5), (64, 512, 7, 7), (24, 16, 1, 1)]
OTHERS = [(24, 5), (12, 4, 10), (12, 4, 2, 3, 5)]
# By dtype of the input: some roundings of it, as the output and the input's gradient are rounded.
SHARES = {torch.float32: 2e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
# A map that depends on the input hands its rounding on, through exponentials.
SHARE_DEPENDENT = 1e-4
SETTINGS = [
    *((shape, dtype, layout) for shape in IMAGES for dtype in SHARES for layout in LAYOUTS),
    *((shape, dtype, "contiguous") for shape in OTHERS for dtype in SHARES),
]


@functools.cache
def layer_of(method, dims, channels, count):
    """Return a trained norm that was converted, in float64; None where the method finds nothing."""
    case = case_of(method)
    base = nn.Sequential(trained_norm(DIMS[dims], channels))
    if case.refusal(base):
        return None
    given = {"contexts": count, "priors": None} if case.labelled else {}
    return widen(case.convert(base, verify=False, **given, **options_of(case.method)))


def shifted(t):
    """Return a tensor that does not begin where vectors of 16 bytes do."""
    flat = t.flatten()
    return torch.cat((flat[:1], flat))[1:].view(t.shape)


def compare(
    method, shape, dtype, layout, training, device, count=3, pattern=MIXED, move=lambda t: t
):
    if device.type == "cpu":
        shape = (min(shape[0], 24), min(shape[1], 8), *shape[2:])
    wide = layer_of(method, len(shape), shape[1], count)
    if wide is None:
        pytest.skip("the method changes nothing here")
    wide = copy.deepcopy(wide)
    model = copy.deepcopy(wide).to(device, torch.float32)
    x = make_batch(shape, offset=0.1, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    labels = labels_for(shape[0], pattern) if case_of(method).labelled else None
    given = None if labels is None else labels.to(device)
    given = None if given is None else move(given)
    found = values_of(model, move(x.to(device)), given, training)
    expected = values_of(wide, x.double(), labels, training)
    if method in SORTED and dtype != torch.float32:
        found, expected = without_gradients(found), without_gradients(expected)
    dependent = get_method(method).input_dependent and dtype == torch.float32
    require_near(found, expected, SHARE_DEPENDENT if dependent else SHARES[dtype])


@EVERY
@TRAINING
@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    SETTINGS,
    ids=[f"{'x'.join(map(str, s))}-{str(d)[6:]}-{m}" for s, d, m in SETTINGS],
)
def test_a_layer_computes_what_it_does_on_the_cpu(method, training, shape, dtype, layout, device):
    compare(method, shape, dtype, layout, training, device)


@EVERY_LABELLED
@TRAINING
@pytest.mark.parametrize("count", [1, 130])
def test_one_context_and_more_contexts_than_a_batch_has(method, training, count, device):
    pattern = torch.zeros(1, dtype=torch.int64) if count == 1 else torch.tensor([129, 0, 7, 129])
    compare(method, (16, 8, 9, 9), torch.float32, "contiguous", training, device, count, pattern)


@EVERY_LABELLED
@TRAINING
def test_contexts_whose_samples_lie_together(method, training, device):
    pattern = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0, 0, -1, -1, -1])
    compare(method, (12, 8, 9, 9), torch.bfloat16, "channels_last", training, device, 3, pattern)


@EVERY
@TRAINING
def test_tensors_that_begin_anywhere(method, training, device):
    shape = (12, 8, 9, 9)
    for move in (lambda t: t, shifted, lambda t: t):
        compare(method, shape, torch.float32, "contiguous", training, device, move=move)
