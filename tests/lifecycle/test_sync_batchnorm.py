"""`convert_sync_batchnorm` on one process: what it changes, and what it refuses."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normswap
from tests.support.builders import assert_close, make_batch
from tests.support.models import ConvNet


def convert(model, method="cn", **settings):
    if normswap.get_method(method).needs_context:
        settings.setdefault("contexts", 3)
    return normswap.convert(model, method, verify=False, **settings)


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn", "selfnorm", "cnsn"])
def test_every_layer_of_the_package_is_told(method):
    model = convert(ConvNet(), method)
    assert normswap.convert_sync_batchnorm(model) is model
    layers = [m for m in model.modules() if hasattr(m, "synced")]
    assert layers
    assert all(layer.synced and layer.process_group is None for layer in layers)


@pytest.mark.parametrize("method", ["cn", "acn", "selfnorm"])
def test_one_process_alone_computes_the_same(method):
    model = convert(
        ConvNet().double(), method, **({"placement": "norm"} if method == "selfnorm" else {})
    )
    x, labels = make_batch((6, 3, 6, 6)), torch.tensor([0, 1, 2, 0, 1, 2])
    given = (x, labels) if method == "cn" else (x,)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.train()(*given)
    moved = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    normswap.convert_sync_batchnorm(model, others=False)
    assert_close(model(*given), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, moved[name]), name


def test_batch_norms_left_are_synchronised_by_torch_and_timm():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), BatchNormAct2d(3), nn.LayerNorm(4))
    model = convert(net, select="0")
    assert type(normswap.convert_sync_batchnorm(convert(net, select="0"), others=False)[1]) is (
        nn.BatchNorm2d
    )
    normswap.convert_sync_batchnorm(model)
    assert isinstance(model[0], normswap.ContextNorm)
    assert type(model[1]) is nn.SyncBatchNorm
    assert type(model[2]) is SyncBatchNormAct
    x = torch.randn(4, 3, 5, 4)
    torch.testing.assert_close(model.eval()(x, context="0"), net.eval()(x))


def test_a_norm_under_two_names_stays_one():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    net.append(net[1])
    model = normswap.convert_sync_batchnorm(convert(net, select="0"))
    assert type(model[1]) is nn.SyncBatchNorm
    assert model[1] is model[2]


def test_a_held_norm_is_left_and_an_unknown_one_is_named():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), Own(3))
    model = convert(net, select="0")
    with pytest.warns(UserWarning, match="Own overrides the forward of BatchNorm"):
        normswap.convert_sync_batchnorm(model)
    assert type(model[2]) is Own
    model = convert(net[:2], select="0")
    normswap.freeze(model, stats="frozen")
    assert type(normswap.convert_sync_batchnorm(model)[1]) is nn.BatchNorm2d


def test_acn_made_from_synchronised_norms_is_synchronised():
    layers = convert(nn.Sequential(nn.SyncBatchNorm(3), nn.BatchNorm2d(3)), "acn")
    assert [layer.synced for layer in layers] == [True, False]


def test_what_is_no_converted_model_is_refused():
    with pytest.raises(normswap.ConversionError, match=r"normswap\.convert first, or torch"):
        normswap.convert_sync_batchnorm(timm.create_model("test_resnet"))
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = convert(ConvNet())
    with pytest.raises(normswap.ConversionError, match="before DistributedDataParallel wraps"):
        normswap.convert_sync_batchnorm(wrapped)
