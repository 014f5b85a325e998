"""Methods of a container that no graph stands for: its forward is scoped."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from tests.support.behave import LABELS, Block, Holder, call, check, close, images, separate


class Cached(Holder):
    """Keeps a table in eval, as attention biases are kept."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        self.cache = {}
        return self

    def biases(self, device):
        if self.training:
            return self.table * 2
        key = str(device)
        if key not in self.cache:
            self.cache[key] = self.table * 2
        return self.cache[key]

    def forward(self, x):
        return self.b(self.a(x) + self.biases(x.device))


def test_a_cache_is_kept_as_it_was():
    converted = check(Cached(), opaque="reads .cache, a dict, which may have changed")
    first = call(converted, (images(),), context=LABELS)
    assert list(converted.cache) == ["cpu"]
    with torch.no_grad():
        converted.table.add_(1)
    close(call(converted, (images(),), context=LABELS), first)
    converted.train().eval()
    assert not torch.allclose(call(converted, (images(),), context=LABELS)[0], first[0])


def test_norms_that_such_a_method_calls_find_the_context():
    class Model(Cached):
        def tail(self, x):
            self.cache["calls"] = 1
            return self.b(x)

        def forward(self, x):
            return self.tail(self.a(x))

    converted = check(Model(), opaque="reads .cache, a dict, which may have changed")
    assert [row.delivery for row in normswap.summary(converted).rows] == ["threaded", "threaded"]


def test_a_checkpoint_taken_where_a_gradient_is_asked_for():
    class Model(Holder):
        def __init__(self):
            super().__init__()
            self.more = nn.ModuleList([Block() for _ in range(2)])

        def any_requires_grad(self, features):
            for feature in features:
                if feature.requires_grad:
                    return True
            return False

        def forward(self, x):
            features = [x]
            for block in self.more:
                features.append(block(features[-1]))
            if self.any_requires_grad(features):
                return checkpoint(self.b, torch.stack(features).sum(0), use_reentrant=False)
            return self.b(torch.stack(features).sum(0))

    converted = check(Model(), opaque="branches on a value")
    separate(converted)
    gradients = []
    for needed in (True, False):
        x = images().requires_grad_(needed)
        converted.zero_grad()
        for parameter in converted.more.parameters():
            parameter.requires_grad_(needed)
        converted(x, context=LABELS).pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in converted.b.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)
