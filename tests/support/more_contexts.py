"""For tests that give a converted model more or fewer contexts."""

import pytest
import torch
from torch import nn

POLICIES = pytest.mark.parametrize("unknown", ["pooled", "posterior"])
KINDS = {
    "cn": {"method": "cn"},
    "cn shared": {"method": "cn", "affine": "shared"},
    "cn-x": {"method": "cn-x"},
    "cn-x batch": {"method": "cn-x", "statistics": "batch"},
    "instance": {"method": "cn", "name": "Instance"},
}


def wrap(model):
    return nn.DataParallel(model)


def hook(model):
    model.neck.bias.register_hook(lambda grad: grad)
    return model


def parametrize(model):
    nn.utils.parametrize.register_parametrization(model.stem[1], "weight", nn.Identity())
    return model


class Quantised(torch.Tensor):
    """A state of a class of its own, as torchao's optimizers have."""

    def __deepcopy__(self, memo):
        return self
