"""CN-X on what torch's batch norm makes of x, by the kernels of CN-X, against float64 loops."""

import pytest
import torch

import normswap
from normswap.functional.labels import Context
from normswap.methods import cnx_batch
from tests.functional.triton.values import (
    DEVICE,
    EVERY_CASE,
    LABELS,
    PRIORS,
    SHARE,
    as_labels,
    compare,
    make,
)
from tests.support import oracles
from tests.support.builders import assert_close, random_

pytestmark = pytest.mark.usefixtures("on_the_device")
POLICIES = ("pooled", "posterior", 1, "error")


@pytest.fixture(autouse=True)
def only_kernels(monkeypatch):
    """Fail where torch's operators serve."""
    for name in ("apply_centred", "stat_affine"):
        monkeypatch.delattr(cnx_batch, name)


def make_batch_layer(channels, unknown="pooled", **settings):
    priors = torch.tensor(PRIORS)
    layer = normswap.BatchContextNormX(
        channels, 4, priors=priors, unknown=unknown, device=DEVICE, **settings
    )
    names = ("weight", "bias", "mu", "log_sigma", "running_mean", "running_var")
    for seed, name in enumerate(names):
        random_(getattr(layer, name), seed, 0.3, 1.5)
    return layer


def compare_batch(layer, x, dy, labels, share=None):
    mean, var = (t.double().clone() for t in (layer.running_mean, layer.running_var))
    training = layer.training and x.numel() > x.shape[1]

    def oracle(x, *given, **settings):
        if training:
            values = x.transpose(0, 1).flatten(1)
            own = values.mean(1), values.var(1, correction=0)
        else:
            own = mean, var
        shape = (-1, *[1] * (x.dim() - 2))
        z = (x - own[0].view(shape)) / (own[1] + layer.eps).sqrt().view(shape)
        return oracles.cnx(z, *given, **settings)

    given = Context(as_labels(labels), None)
    settings = {"priors": layer.priors.tolist(), "unknown": layer.unknown}
    # z is rounded to the dtype of x, too.
    share = share or 2 * SHARE[x.dtype]
    compare(layer, x, dy, labels, oracle, share, given=given, **settings)
    if training:
        values = x.detach().double().transpose(0, 1).flatten(1)
        rate = 1.0 if layer.momentum is None else layer.momentum  # of the first batch
        mean, var = mean.lerp(values.mean(1), rate), var.lerp(values.var(1), rate)
    assert_close(layer.running_mean, mean, 1e-6)
    assert_close(layer.running_var, var, 1e-6)
    assert int(layer.num_batches_tracked) == training


@EVERY_CASE
def test_values_gradients_and_running_statistics(dtype, layout):
    compare_batch(make_batch_layer(3), *make((7, 3, 5, 3), dtype, layout, offset=0.5), LABELS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unknown", POLICIES)
def test_each_policy(unknown, training):
    labels = [2, 0, 3] if unknown == "error" else [2, -1, 3]
    layer = make_batch_layer(2, unknown, momentum=None).train(training)
    compare_batch(layer, *make((3, 2, 2, 3), offset=0.5), labels)


def test_one_value_a_channel_is_normalised_with_the_running_statistics():
    compare_batch(make_batch_layer(4), *make((1, 4, 1, 1)), [2])


@pytest.mark.parametrize("frozen", ["stats_frozen", "frozen"])
def test_frozen_statistics_stay(frozen):
    layer = make_batch_layer(2)
    setattr(layer, frozen, True)
    before = layer.running_mean.clone()
    layer(make((3, 2, 2, 2))[0], as_labels([0, 1, 2]))
    assert torch.equal(layer.running_mean, before)
    assert not layer.num_batches_tracked
