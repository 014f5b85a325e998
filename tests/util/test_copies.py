"""Copies of models that cache tensors, or hold what cannot be copied."""

import copy
import threading

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap import ConversionError


class Caches(nn.Module):
    """Keeps what a forward computed with gradients, in one place or another."""

    def __init__(self, keep):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.cached, self.caches, self.nested = None, {}, [{}]
        self.keep = keep

    def forward(self, x):
        if self.cached is None and not self.caches and not self.nested[0]:
            self.keep(self, self.scale.exp())
        scale = self.cached if self.cached is not None else self.scale.exp()
        return self.bn(x) * scale


KEEPS = {
    "attribute": lambda m, value: setattr(m, "cached", value),
    "dict": lambda m, value: m.caches.update(cpu=value),
    "nested": lambda m, value: m.nested[0].update(cpu=[(value,)]),
}
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KEEPS)
def cached(request):
    model = Caches(KEEPS[request.param]).eval()
    model(X)
    return model


@pytest.mark.parametrize("method", ["cn", "acn", "selfnorm"])
def test_a_model_that_caches_tensors_with_gradients_is_converted(cached, method):
    given = {"contexts": 2} if method == "cn" else {}
    given |= {"placement": "norm"} if method == "selfnorm" else {}
    model = normswap.convert(cached, method, example_inputs=X, **given)
    torch.testing.assert_close(model(X), cached(X))
    values = (model.cached, *model.caches.values(), *model.nested[0].values())
    assert not any(v.requires_grad for v in values if isinstance(v, torch.Tensor))
    assert normswap.plan(cached, method, **given).rows


def test_the_original_keeps_its_cache_with_gradients(cached):
    normswap.convert(cached, "cn", contexts=2)
    if cached.cached is not None:
        assert cached.cached.requires_grad


def test_one_cached_tensor_under_two_names_stays_one():
    model = Caches(lambda m, value: m.caches.update(a=value, b=value)).eval()
    model(X)
    twin = normswap.convert(model, "cn", contexts=2)
    assert twin.caches["a"] is twin.caches["b"]


def test_converted_models_that_cache_go_back_and_load(cached, tmp_path):
    model = normswap.convert(cached, "cn", contexts=2).eval()
    cached.cached = None
    model(X)
    torch.testing.assert_close(normswap.revert(model, "0")(X), model(X))
    normswap.save(model, tmp_path)
    torch.testing.assert_close(normswap.load(cached, tmp_path)(X), model(X))


def test_levit_after_an_evaluation_with_gradients():
    model = timm.create_model("levit_128s").eval()
    model(torch.randn(1, 3, 224, 224))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert normswap.plan(model, "cn", contexts=2).count(action="replaced") > 50
    twin = normswap.convert(model, "cn", contexts=2, verify=False)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-3, atol=1e-3)


class MadeAnew(nn.Flatten):
    """Runs its initialisation when it is copied, as the layers of einops do."""

    def __getstate__(self):
        return {"start_dim": self.start_dim}

    def __setstate__(self, state):
        self.__init__(**state)


def test_modules_that_are_made_anew_when_copied_keep_their_mode():
    base = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), MadeAnew()).eval()
    model = normswap.convert(base, "cn", contexts=2)
    for converted in (model, normswap.revert(model), normswap.specialize(model, 0)):
        assert not any(module.training for module in converted.modules())
    assert not any(module.training for module in base.modules())


def test_what_cannot_be_copied_is_named():
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(3)))
    model[0].lock = threading.Lock()
    with pytest.raises(ConversionError, match=r"its attribute 0\.lock \(<unlocked .*inplace=True"):
        normswap.convert(model, "cn", contexts=2)
    assert isinstance(model[0][0], nn.BatchNorm1d)
    normswap.convert(model, "cn", contexts=2, inplace=True)
    assert isinstance(model[0][0], normswap.ContextNorm)
