"""What code that reads a norm finds on the layer that replaced it."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.lifecycle.record import method_layers
from normswap.sites import read_site

METHODS = [name for name in normswap.methods() if hasattr(normswap.get_method(name), "build")]
NORMS = {
    "batch": nn.BatchNorm2d(4),
    "settings": nn.BatchNorm2d(4, eps=1e-3, momentum=0.3),
    "cumulative": nn.BatchNorm2d(4, momentum=None),
    "no affine": nn.BatchNorm2d(4, affine=False),
    "synced": nn.SyncBatchNorm(4, momentum=0.2),
    "instance": nn.InstanceNorm2d(4),
    "instance affine": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}
PAIRS = [
    (kind, method)
    for kind, norm in NORMS.items()
    for method in METHODS
    if not normswap.get_method(method).refuse(read_site("0", norm))
]
SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats", "training")


def convert(norm, method, **options):
    model = nn.Sequential(copy.deepcopy(norm).eval())
    if normswap.get_method(method).needs_context:
        options["contexts"] = 3
    return normswap.convert(model, method, verify=False, **options)[0]


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_settings_are_those_of_the_norm(kind, method):
    layer = convert(NORMS[kind], method)
    for twin in (layer, copy.deepcopy(layer)):
        found = {name: getattr(twin, name) for name in SETTINGS}
        assert found == {name: getattr(NORMS[kind].eval(), name) for name in SETTINGS}


@pytest.mark.parametrize(("kind", "method"), PAIRS)
def test_resetting_starts_anew(kind, method):
    layer = convert(NORMS[kind], method)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point() and tensor is not getattr(layer, "priors", None):
            tensor.data.add_(0.5)
    layer.reset_running_stats()
    found = dict(layer.named_buffers())
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        if name in found:
            assert (found[name] == value).all()
    layer.reset_parameters()
    norm = copy.deepcopy(NORMS[kind]).eval()
    norm.reset_parameters()
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    # A fresh CN-X is the identity, a fresh batch norm divides by sqrt(1 + eps).
    torch.testing.assert_close(layer(x), norm(x), rtol=max(norm.eps, 1e-5), atol=1e-6)


SWITCHED = [(kind, method) for kind, method in PAIRS if kind not in ("synced", "instance")]


@pytest.mark.parametrize(("kind", "method"), SWITCHED)
def test_tracking_that_is_switched_off_for_a_while(kind, method):
    layer, norm = convert(NORMS[kind], method), copy.deepcopy(NORMS[kind])
    given = {}
    if normswap.get_method(method).needs_context:
        given["context"] = torch.zeros(3, dtype=torch.int64)
    x = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0)) + 2
    for training, tracks in ((True, False), (False, False), (True, True), (False, True)):
        outputs, moved = [], []
        for module, labels in ((norm, {}), (layer, given)):
            module.train(training).track_running_stats = tracks
            before = {n: b.clone() for n, b in module.named_buffers()}
            outputs.append(module(x, **labels))
            now = dict(module.named_buffers())
            moved.append({n for n in before if "running" in n and not before[n].equal(now[n])})
        if "running_mean" in before:
            assert moved[1] == moved[0]
        if method == "cn":
            torch.testing.assert_close(outputs[1], outputs[0])


@pytest.mark.parametrize("method", METHODS)
def test_going_back_keeps_the_settings(method):
    norm = nn.BatchNorm2d(4, affine=False, momentum=0.3)
    options = {"contexts": 1} if normswap.get_method(method).needs_context else {}
    model = normswap.convert(nn.Sequential(norm), method, verify=False, **options)
    back = normswap.revert(model)[0]
    assert {n: getattr(back, n) for n in SETTINGS} == {n: getattr(norm, n) for n in SETTINGS}
    assert back.weight is None


def test_layers_made_by_hand_have_settings_too():
    assert normswap.ContextNorm(4, 2).affine
    assert normswap.ContextNorm(4, 2).track_running_stats
    assert not normswap.ContextNormX(4, 2, affine=False).affine
    assert not normswap.ContextNormX(4, 2).track_running_stats
    assert not normswap.AdaptiveContextNorm(4, statistics="learned").track_running_stats


class Any3d(nn.BatchNorm2d):
    """Takes sequences too."""

    def _check_input_dim(self, input):
        if input.dim() not in (3, 4):
            raise ValueError("expected 3 or 4 dimensions")


@pytest.mark.parametrize("method", METHODS)
def test_a_norm_with_a_check_of_its_own_takes_what_it_took(method):
    model = nn.Sequential(Any3d(4)).eval()
    nn.init.normal_(model[0].running_mean, generator=torch.Generator().manual_seed(0))
    options = {"contexts": 2} if normswap.get_method(method).needs_context else {}
    converted = normswap.convert(model, method, verify=False, **options)
    for shape in ((3, 4, 5), (3, 4, 5, 5)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(converted(x), model(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", normswap.methods())
def test_integers_are_refused_for_results_would_be_cut_off(method, training):
    model = normswap.convert(nn.Sequential(nn.BatchNorm1d(3)), method).train(training)
    images = torch.randint(256, (4, 3, 5), dtype=torch.uint8)
    (layer,) = method_layers(model).values()
    with pytest.raises(normswap.NormswapError, match=r"\*\) at .* of torch.uint8; values are"):
        layer(images)
