"""References to norms in attributes of a model: replaced with them, or refused."""

import functools
import types
import weakref
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import normswap
from tests.support.rows import LABELS, K, N, apart


@dataclass
class Pair:
    first: nn.Module


class Held(nn.Module):
    """Runs its norm by way of what `hold` makes of it and `take` takes it from."""

    def __init__(self, hold, take):
        super().__init__()
        self.add_module("norm", nn.BatchNorm1d(6))
        self._held = hold(self.norm)
        self.take = take

    def forward(self, x):
        return self.take(self._held)(x)


EXCHANGED = {
    "itself": (lambda norm: norm, lambda held: held),
    "list": (lambda norm: [norm], lambda held: held[0]),
    "dict": (lambda norm: {"n": norm}, lambda held: held["n"]),
    "list in a dict in a tuple": (lambda norm: ({"n": [norm]},), lambda held: held[0]["n"][0]),
    "ordered dict": (lambda norm: OrderedDict(n=norm), lambda held: held["n"]),
    "user dict": (lambda norm: UserDict(n=norm), lambda held: held["n"]),
    "deque": (lambda norm: deque([norm]), lambda held: held[0]),
    "namespace": (lambda norm: types.SimpleNamespace(n=norm), lambda held: held.n),
    "dataclass": (Pair, lambda held: held.first),
    "namespace in a partial": (
        lambda norm: functools.partial(getattr, types.SimpleNamespace(n=norm)),
        lambda held: held("n"),
    ),
}
REFUSED = {
    "bound method": lambda norm: norm.forward,
    "partial": lambda norm: functools.partial(nn.BatchNorm1d.forward, norm),
    "tuple": lambda norm: {"n": [(norm,)]},
    "set": lambda norm: {norm},
    "key": lambda norm: {norm: 2.0},
    "weak reference": weakref.ref,
    "module": lambda norm: [nn.Sequential(norm)],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("hold", "take"), EXCHANGED.values(), ids=EXCHANGED)
def test_a_norm_that_is_also_held_elsewhere_is_replaced_there_too(hold, take, inplace):
    original = Held(hold, take).double().eval()
    model = apart(normswap.convert(original, "cn", contexts=K, inplace=inplace))
    assert take(model._held) is model.norm
    assert take(original._held) is original.norm
    x = torch.randn(N, 6, dtype=torch.float64)
    singly = [model(x[i : i + 1], context=LABELS[i : i + 1]) for i in range(N)]
    assert torch.allclose(model(x, context=LABELS), torch.cat(singly), rtol=1e-12)
    assert not model(x, context=LABELS).allclose(model(x))
    plain = normswap.specialize(model, 1)
    assert take(plain._held) is plain.norm


@pytest.mark.parametrize("hold", REFUSED.values(), ids=REFUSED)
def test_a_norm_held_where_none_can_take_its_place_is_refused(hold):
    model = Held(hold, None)
    with pytest.raises(normswap.ConversionError, match=r"holds a norm to be replaced.*exclude='"):
        normswap.convert(model, inplace=True)
    assert isinstance(model.norm, nn.BatchNorm1d)


def test_a_copy_of_a_model_with_a_weak_reference_would_run_the_original():
    model = Held(weakref.ref, lambda held: held())
    with pytest.raises(normswap.ConversionError, match=r"weak reference.*inplace=True"):
        normswap.convert(model)
