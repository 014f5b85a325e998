"""Layers on two processes against one process over both their batches."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import normswap
from tests.support.builders import assert_close, make_batch
from tests.support.ranks import on_two_processes

pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.timeout(120),
]


CHANNELS = 4
KINDS = {
    "channel": {"method": "acn"},
    "position": {"method": "acn", "assignment": "position"},
    "instance": {"method": "acn", "assignment": "instance"},
    "learned": {"method": "acn", "statistics": "learned"},
    "selfnorm": {"method": "selfnorm", "placement": "norm", "gates": 2},
}
# The sizes of the two processes' batches.
SIZES = {"uneven": (5, 2), "one each": (1, 1), "one empty": (3, 0), "both empty": (0, 0)}


def make_layer(kind):
    torch.manual_seed(4)
    settings = dict(KINDS[kind])
    if settings["method"] == "selfnorm":
        layer = normswap.SelfNorm(CHANNELS, gates=2).double()
        for gate in (layer.g, layer.f):
            nn.init.uniform_(gate.bn_weight, 0.5, 1.5)
            nn.init.normal_(gate.running_mean)
        return nn.Sequential(layer).train()
    model = normswap.convert(
        nn.Sequential(nn.BatchNorm2d(CHANNELS)).double(), verify=False, **settings
    )
    nn.init.normal_(model[0].mu)
    return model.train()


def batch_of(size, rank):
    return (1 + rank) * make_batch((size, CHANNELS, 3, 2), seed=rank, offset=3.0)


def step(model, x, cotangent):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * cotangent).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "parameters": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }


def on_layers(rank):
    results = {}
    for kind in KINDS:
        for case, sizes in SIZES.items():
            x = batch_of(sizes[rank], rank)
            model = normswap.convert_sync_batchnorm(make_layer(kind))
            results[kind, case] = step(model, x, x.cos())
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes({"layers": on_layers}, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_two_processes_equal_one_over_both_batches(ranks, kind, case):
    actual = [results["layers"][kind, case] for results in ranks]
    x = torch.cat([batch_of(size, rank) for rank, size in enumerate(SIZES[case])])
    expected = step(make_layer(kind), x, x.cos())
    for name in ("y", "x"):
        joined = torch.cat([result[name] for result in actual])
        assert joined.shape == expected[name].shape
        if len(joined):
            assert_close(joined, expected[name])
    for name, gradient in expected["parameters"].items():
        parts = [result["parameters"][name] for result in actual]
        if gradient is None:
            assert all(part is None or not part.any() for part in parts), name
        else:
            assert_close(sum(parts), gradient)
    for name, value in expected["buffers"].items():
        first, second = (result["buffers"][name] for result in actual)
        assert torch.equal(first, second), name
        assert_close(first.double(), value.double())
