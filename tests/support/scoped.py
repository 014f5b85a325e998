"""Models to run with a context in scope, here or in another thread."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import normswap
from tests.support.behave import Block, Own, images, separate


def make(model=None):
    torch.manual_seed(0)
    converted = normswap.convert((model or Own()).eval(), "cn", contexts=3, verify=False)
    separate(converted)
    return converted


def run(model, **given):
    with torch.no_grad():
        return model(images(), **given)


def in_thread(function, *args):
    """Return what a new thread returns, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


class Paused(nn.Module):
    """Waits in the middle of its forward when it is told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x, pause=None):
        try:
            y = self.a(x)
        except ZeroDivisionError:
            y = x
        if pause is not None:
            pause()
        return self.b(y)
