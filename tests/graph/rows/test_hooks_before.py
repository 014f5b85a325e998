"""Hooks may put samples in another order, or keep what the model goes on with."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import normswap
from normswap.errors import ContextError
from tests.support.rows import LABELS, K, N, apart, check, rows_of, singly


def make(trace=True):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()
    return apart(normswap.convert(model, "cn", contexts=K, verify=False, trace=trace))


def flip(module, args):
    (x,) = args
    return (x.flip(0),)


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("count", [N, N + 5])
def test_a_hook_of_the_whole_model_that_reorders_is_measured(count, trace):
    model, x = make(trace), torch.randn(count, 6)
    labels = torch.arange(count) % K
    expected = torch.cat([model(x[i : i + 1], context=int(k)) for i, k in enumerate(labels)])
    model.register_forward_pre_hook(flip)
    for _ in range(2):
        assert torch.allclose(model(x, context=labels), expected.flip(0), atol=1e-6)
    with normswap.use_context(model, labels):
        assert torch.allclose(model(x), expected.flip(0), atol=1e-6)


def test_a_hook_of_every_module_that_reorders_the_whole_model_is_measured():
    model, x = make(), torch.randn(N, 6)
    expected = singly(model, x).flip(0)
    first = lambda m, args: flip(m, args) if isinstance(m, nn.Sequential) else None  # noqa: E731
    handle = register_module_forward_pre_hook(first)
    try:
        assert torch.allclose(model(x, context=LABELS), expected, atol=1e-6)
    finally:
        handle.remove()


def test_a_hook_that_mixes_samples_is_an_error():
    model = make()
    model.register_forward_pre_hook(lambda m, args: (0.7 * args[0] + 0.3 * args[0].flip(0),))
    with pytest.raises(ContextError, match="made of several samples"):
        model(torch.randn(N, 6), context=LABELS)


def halve(module, args):
    return args[0] / 2


def widen(module, args):
    """Does not take what it returns."""
    (x,) = args
    return torch.cat([x, x.view(-1, 5)[:, :1]], 1)


@pytest.mark.parametrize(("hook", "width"), [(halve, 6), (widen, 5)])
def test_a_hook_that_only_changes_values_is_no_obstacle(hook, width):
    model, x = make(), torch.randn(N, width)
    model.register_forward_pre_hook(hook)
    assert torch.allclose(model(x, context=LABELS), singly(model, x), atol=1e-6)
    assert rows_of(model) == {"1": "one per sample"}


def test_a_hook_that_sees_the_labels_may_move_them_with_the_samples():
    model, x = make(), torch.randn(N, 6)
    expected = singly(model, x).flip(0)

    def both(module, args, kwargs):
        return flip(module, args), {"context": kwargs["context"].flip(0)}

    model.register_forward_pre_hook(both, with_kwargs=True)
    assert torch.allclose(model(x, context=LABELS), expected, atol=1e-6)


@pytest.mark.parametrize("taken", [lambda kept: kept[-1], list.pop], ids=["looked at", "taken"])
def test_a_forward_may_go_on_with_what_a_hook_keeps(taken):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm, self.kept = nn.Linear(6, 6), nn.BatchNorm1d(6), []
            self.linear.register_forward_hook(self.keep)

        def keep(self, module, args, output):
            self.kept.append(output.flip(0))

        def forward(self, x):
            self.linear(x)
            return self.norm(taken(self.kept)).flip(0)

    model = Skipping().double().eval()
    normswap.convert(model, "cn", contexts=K, verify=False, inplace=True)
    check(apart(model))
    assert rows_of(model) == {"norm": "permuted"}
