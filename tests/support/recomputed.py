"""Models of which checkpointing computes a part again."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normswap
from tests.support.behave import Holder, separate

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
TRAINING = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


class Inside(Holder):
    """Keeps its own forward, and has a part of it computed again."""

    def __init__(self, wrap=lambda f, x: f(x)):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        try:
            y = self.a(x)
        except ZeroDivisionError:
            y = x
        return self.wrap(lambda y: self.b(y.sin()), y)


def make(model, training=False):
    torch.manual_seed(0)
    converted = normswap.convert(model.eval(), "cn", contexts=3, verify=False)
    separate(converted)
    return converted.train(training)


def plainly(function, x):
    return function(x)


def again(reentrant):
    return lambda function, x: checkpoint(function, x, use_reentrant=reentrant)
