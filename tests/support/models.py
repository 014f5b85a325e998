"""Small models, and conversions of them whose contexts differ."""

import torch

import normswap
from normswap.methods.layer import ContextLayer
from normswap.testing.case import PRIORS
from normswap.testing.case import move as train  # noqa: F401
from normswap.testing.models import MODELS as MODELS
from normswap.testing.models import ConvNet as ConvNet
from normswap.testing.models import Windows as Windows
from normswap.testing.models import make_inputs as make_inputs
from normswap.testing.models import make_model as make_model
from normswap.testing.models import random_

K = 3
NAMES = ["a", "b", "c"]
MIXED = torch.tensor([2, 0, 1, 0, -1, 2])


def convert(model, method, **settings):
    return normswap.convert(model, method, **{"contexts": K, "priors": PRIORS, **settings})


def separate(model, seed=0):
    """Give every context its own random statistics and affine."""
    layers = [m for m in model.modules() if isinstance(m, ContextLayer)]
    for layer in layers:
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 2:
                seed += 1
                offset = random_(torch.empty_like(tensor), seed, 0, 0.7)
                with torch.no_grad():
                    tensor.add_(offset)
    assert layers
    return model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
