"""What conversions of throw-away classes leave behind; NORMSWAP_CONVERSIONS sets how many.

In a process of its own: what other tests compiled may know of every class of a module.
"""

import copy
import gc
import linecache
import os
import sys
import weakref

import torch
from torch import nn

import normswap
from tests.support.behave import CHANNELS, LABELS, Block, images

CONVERSIONS = int(os.environ.get("NORMSWAP_CONVERSIONS", "12"))
METHODS = ["cn", "cn-x", "acn", "crossnorm"]


def convert_own_class(index):
    """Convert and run a model of a class of its own; return weak references to its classes."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.rest = nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU())
            self.seen = [index]

        def run(self, x, features):
            features.append(x)
            return self.rest(x)

        def forward(self, x):
            features = [x] if self.training else []
            return self.run(self.block(x), features)

    method = METHODS[index % len(METHODS)]
    labelled = method.startswith("cn")
    converted = normswap.convert(Model(), method, contexts=3 if labelled else None)
    for mode in (True, False):
        twin = copy.deepcopy(converted.train(mode))
        twin(images(), **({"context": LABELS} if labelled else {}))
    return [weakref.ref(cls) for cls in type(twin).__mro__[: 2 if method != "acn" else 1]]


def look_for_leaks():
    for index in range(8):
        convert_own_class(index)
    gc.collect()
    sources, blocks = len(linecache.cache), sys.getallocatedblocks()
    classes = [ref for index in range(CONVERSIONS) for ref in convert_own_class(index)]
    gc.collect()
    assert not [ref for ref in classes if ref() is not None]
    assert len(linecache.cache) == sources
    # The references alone are two or three blocks each; a class with its graphs is thousands.
    assert sys.getallocatedblocks() - blocks < 10 * CONVERSIONS


def look_for_second_classes():
    for method, contexts in (("cn", 3), ("crossnorm", None)):
        first, second = (normswap.convert(Block(), method, contexts=contexts) for _ in range(2))
        assert type(first) is type(second) is not Block
        made = weakref.ref(type(first))
        del first, second
        gc.collect()
        assert made() is None


def look(_):
    look_for_second_classes()
    look_for_leaks()


def test_conversions_leave_no_class_no_source_and_no_memory_and_share_classes_that_live():
    torch.multiprocessing.start_processes(look, start_method="forkserver")
