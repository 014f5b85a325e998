"""Parameters of layers that are computed from others since conversion: pruned, or parametrized."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import normswap
from normswap import ConversionError
from tests.support.models import make_inputs, make_model

METHODS = {"cn": "weight", "cn-x": "mu"}
EACH = pytest.mark.parametrize("method", METHODS)
HOW = pytest.mark.parametrize("how", ["pruned", "parametrized"])
LABELS = [0, 1, 2, 0, 1, 2]


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def make(method, how):
    """Return a model, and the names in it of what a computed parameter comes from."""
    model = normswap.convert(make_model("ConvNet", torch.float64), method, contexts=3)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, normswap.ContextNorm)}
    layers |= {n: m for n, m in model.named_modules() if isinstance(m, normswap.ContextNormX)}
    name = METHODS[method]
    for layer in layers.values():
        if how == "pruned":
            prune.l1_unstructured(layer, name, 0.3)
        else:
            parametrize.register_parametrization(layer, name, Twice())
    end = f"{name}_orig" if how == "pruned" else f"parametrizations.{name}.original"
    return model, {f"{n}.{end}" for n in layers}


@EACH
@HOW
@pytest.mark.parametrize("train", ["norms", "contexts"])
def test_what_it_is_computed_from_is_trained_in_its_place(method, how, train):
    model, names = make(method, how)
    normswap.freeze(model, train)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names <= trained
    assert not any("conv" in name or "head" in name for name in trained)


@EACH
@HOW
def test_what_it_is_computed_from_is_spared_from_decay(method, how):
    model, names = make(method, how)
    decayed = {
        id(p)
        for group in normswap.param_groups(model, 0.1, 0.05)
        for p in group["params"]
        if group["weight_decay"]
    }
    assert decayed
    assert not any(id(model.get_parameter(name)) in decayed for name in names)


@EACH
@HOW
def test_what_needs_it_as_a_parameter_refuses_it(method, how, tmp_path):
    model, _ = make(method, how)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for needs in (
        lambda: normswap.save(model, tmp_path),
        lambda: normswap.keep_absent_rows(optimizer, model),
    ):
        with pytest.raises(ConversionError, match=r"prune\.remove .*remove_parametrizations"):
            needs()
    assert not list(tmp_path.iterdir())


@HOW
def test_statistics_that_could_not_be_set_are_refused(how):
    model, _ = make("cn-x", how)
    x = make_inputs(model)
    before = model.eval()(x, context=LABELS)
    with pytest.raises(ConversionError, match=r"mu as a parameter, .* cannot be set"):
        normswap.adapt(model, [x], 1)
    assert torch.equal(model(x, context=LABELS), before)


@HOW
def test_statistics_beside_it_are_set(how):
    model, _ = make("cn", how)
    assert min(normswap.adapt(model, [3 * make_inputs(model)], 1).values()) > 0
