"""A converted model, batches that lack contexts, and what a step moves."""

import torch
from torch import nn

import normswap

K, C = 3, 4
# Labels of each step: context 2 comes late, context 0 is missing twice, one step has 1 alone.
STEPS = [[0, 1, 1, 0], [1, 1, 1, 1], [2, 0, 2, 0], [1, 2, 1, 2], [0, 1, 2, 2], [0, 0, 0, 0]]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adam, foreach": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, 0.1),
}


def converted(method="cn", kind=nn.BatchNorm2d):
    model = nn.Sequential(kind(C, affine=True, dtype=torch.float64))
    return normswap.convert(model, method, contexts=K, verify=False).train()


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(0)
    for labels in steps:
        x, target = torch.randn(2, len(labels), C, 3, 3, generator=generator, dtype=torch.float64)
        yield x, target, torch.tensor(labels)


def loss_of(y, target):
    return (y - target).square().sum()


def tables(model):
    return {n: t.detach().clone() for n, t in model[0].named_parameters()}
