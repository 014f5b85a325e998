"""Triton's kernels serve where they can, and torch's operators where they can't."""

import copy
import sys

import pytest
import torch
from torch import nn

import normswap
from normswap.functional import backend, kernels
from tests.support.builders import assert_close, make_batch


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(backend, "DEVICES", ("cpu",))
    works = backend._works
    works.cache_clear()
    yield
    works.cache_clear()


@pytest.fixture
def working(on_a_cpu, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(backend, "_works", lambda device, dtype: True)


def x_of(dtype=torch.float32):
    return make_batch((2, 3, 4, 5), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_serves_what_the_kernels_read(working, dtype):
    assert backend.triton_for(x_of(dtype)) is not None
    assert backend.triton_for(x_of(dtype), "context_norm", torch.zeros(3), None) is not None


def test_it_leaves_the_rest_to_torch(working):
    x = x_of()
    assert backend.triton_for(x_of(torch.float64)) is None
    assert backend.triton_for(x[:, :, 0, 0]) is None
    assert backend.triton_for(x[:0]) is None
    assert backend.triton_for(x.repeat(1, 1, 1, 2)[..., ::2]) is None
    assert backend.triton_for(x[:, :, 0].transpose(1, 2)) is None
    assert backend.triton_for(x, "context_norm", torch.zeros(3, 2).t()) is None
    assert backend.triton_for(x, "context_norm", torch.zeros(3, device="meta")) is None
    found = []
    torch.func.vmap(lambda t: found.append(backend.triton_for(t)) or t)(x.unsqueeze(0))
    assert found == [None]


def test_a_variable_turns_it_off(on_a_cpu, monkeypatch):
    monkeypatch.setenv("NORMSWAP_TRITON", "0")
    assert backend.triton_for(x_of()) is None  # and no warning, which is an error here


def test_without_triton_torch_serves_and_it_is_said_once(on_a_cpu, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("normswap.functional.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    x = x_of()
    with pytest.warns(UserWarning, match=r"don't work on cpu.*NORMSWAP_TRITON=0"):
        found = kernels.stats(x)
    assert_close(found.mean, x.double().mean((2, 3)), 1e-6)
    kernels.stats(x)  # warnings are errors here


class Tagged(torch.Tensor):
    """As images and labels of fastai and MONAI are."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["cn", "cn-x", "acn", "crossnorm", "selfnorm"])
def test_tensors_of_a_subclass_compute_what_plain_ones_do(method, training):
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4)).double()
    model = normswap.convert(net, method, **({"contexts": 2} if method.startswith("cn") else {}))
    model.train(training)
    x, labels = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, -1, 1])

    def run(x, labels):
        given = {"context": labels} if method.startswith("cn") else {}
        twin = copy.deepcopy(model)
        torch.manual_seed(0)
        y = twin(x, **given)
        y.square().sum().backward()
        return type(y), [y.detach().as_subclass(torch.Tensor), *(p.grad for p in twin.parameters())]

    _, expected = run(x, labels)
    kind, actual = run(x.as_subclass(Tagged), labels.as_subclass(Tagged))
    assert kind is Tagged
    assert run(x, labels.as_subclass(Tagged))[0] is torch.Tensor
    torch.testing.assert_close(actual, expected)
