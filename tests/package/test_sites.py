"""Reading norms: what their forward does counts, not what their class or constructor says."""

import copy
import re

import numpy
import pytest
import timm.layers
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import normswap
from normswap.sites import read_site

IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class DetrFrozenBatchNorm2d(nn.Module):
    """As DETR has it: eps stands in the forward."""

    def __init__(self, n, eps=1e-5):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((n,), float(value)))
        self.written = eps

    def forward(self, x):
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        running_var = self.running_var.reshape(1, -1, 1, 1)
        running_mean = self.running_mean.reshape(1, -1, 1, 1)
        scale = weight * (running_var + self.written).rsqrt()
        return x * scale + (bias - running_mean * scale)


class Uneven(DetrFrozenBatchNorm2d):
    """Not a batch norm: no variance."""

    def forward(self, x):
        return x * self.weight.view(1, -1, 1, 1)


def filled(norm):
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.01, 2)
    return norm


FROZEN = {
    "detr": lambda: DetrFrozenBatchNorm2d(3),
    "detr, another eps": lambda: DetrFrozenBatchNorm2d(3, 0.3),
    "torchvision": lambda: torchvision.ops.FrozenBatchNorm2d(3, 1e-3),
    "timm, act": lambda: timm.layers.FrozenBatchNormAct2d(3),
}


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
@pytest.mark.parametrize("make", FROZEN.values(), ids=FROZEN)
def test_frozen_batch_norms_of_every_library_are_converted(make, method):
    base = nn.Sequential(nn.Conv2d(3, 3, 1), filled(make()))
    given = {} if method == "acn" else {"contexts": 2}
    model = normswap.convert(base, method, example_inputs=IMAGES, **given)
    assert normswap.summary(model).verification.largest < 1e-5
    torch.testing.assert_close(normswap.revert(model)(IMAGES), base(IMAGES))
    assert type(normswap.revert(model)[1]) is type(base[1])


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.5])
def test_eps_that_stands_in_a_forward_is_measured(eps):
    norm = filled(DetrFrozenBatchNorm2d(5, eps))
    before = copy.deepcopy(norm.state_dict())
    assert read_site("", norm).eps == eps
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_eps_is_measured_without_values():
    with torch.device("meta"):
        norm = DetrFrozenBatchNorm2d(5)
    assert read_site("", norm).eps == 1e-5


def test_measuring_runs_no_hook():
    norm, calls = DetrFrozenBatchNorm2d(3), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    read_site("", norm)
    assert calls == []


def test_a_frozen_norm_of_another_function_is_refused_and_says_that_eps_is_missing():
    class OddFrozenBatchNorm2d(Uneven):
        pass

    reason = read_site("", OddFrozenBatchNorm2d(3))
    assert "its forward is not weight * (x - running_mean)" in reason
    assert "no attribute eps" in reason


def test_a_frozen_norm_whose_attribute_is_not_its_eps_is_refused():
    class OddFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        eps = 1e-2

    assert "its forward is not" in read_site("", OddFrozenBatchNorm2d(3))


def test_a_frozen_norm_whose_forward_needs_more_is_refused():
    class OddFrozenBatchNorm2d(DetrFrozenBatchNorm2d):
        def forward(self, x, scale):
            return x * scale

    assert "cannot be run alone (TypeError" in read_site("", OddFrozenBatchNorm2d(3))


@pytest.mark.parametrize("recompute", [prune.random_unstructured, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_norm_whose_weight_a_hook_computes_is_refused(recompute):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    given = {"amount": 1} if recompute is not nn.utils.weight_norm else {"dim": None}
    recompute(model[0], "weight", **given)
    assert "weight is computed from other tensors" in read_site("", model[0])
    converted = normswap.convert(model, "cn", contexts=2, example_inputs=IMAGES)
    torch.testing.assert_close(converted.eval()(IMAGES), model.eval()(IMAGES))


def untracked(kind):
    """A norm whose statistics were measured, then no longer tracked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4, affine=True, track_running_stats=True))
    model.train()(3 * torch.randn(8, 3, 6, 6) + 1)
    model[1].track_running_stats = False
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_track_running_stats_set_after_construction_is_read(kind, mode):
    base = untracked(kind)
    model = normswap.convert(base, "cn", example_inputs=IMAGES)
    assert normswap.summary(model).verification.largest < 1e-5
    for each in (base, model):
        each.train(mode == "train")
    for _ in range(3):
        torch.testing.assert_close(model(IMAGES), base(IMAGES))
    base.eval(), model.eval()
    torch.testing.assert_close(model(2 * IMAGES), base(2 * IMAGES))


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_norm_that_no_longer_tracks_comes_back_and_loads(kind):
    base = untracked(kind)
    model = normswap.convert(base, "cn", contexts=2)
    back = normswap.revert(model)[1]
    assert (back.track_running_stats, back.momentum) == (False, 0.1)
    assert torch.equal(back.running_mean, base[1].running_mean)
    model.load_state_dict(base.state_dict())
    torch.testing.assert_close(model.eval()(IMAGES), base.eval()(IMAGES))


class Sums(nn.Module):
    """A residual block all of whose sizes are NumPy's, as lengths and counts of tables are."""

    def __init__(self, count, eps, momentum):
        super().__init__()
        self.conv = nn.Conv2d(count, count, 1)
        self.norm = nn.BatchNorm2d(count, eps, momentum)

    def forward(self, x):
        return x + self.norm(self.conv(x))


@pytest.mark.parametrize("method", normswap.methods())
def test_numbers_that_are_not_pythons_are_taken_as_torch_takes_them(method):
    torch.manual_seed(0)
    base = Sums(numpy.int64(3), numpy.float32(0.01), numpy.float32(0.2)).eval()
    same = Sums(3, float(numpy.float32(0.01)), float(numpy.float32(0.2))).eval()
    same.load_state_dict(base.state_dict())
    given = {"contexts": 2} if normswap.get_method(method).needs_context else {}
    for placement in (None, "input"):
        labels = {"context": torch.tensor([0, 1, 1, 0])} if given else {}
        made = []
        for each in (base, same):
            torch.manual_seed(0)
            made.append(normswap.convert(each, method, placement=placement, **given).train())
            made[-1](IMAGES, **labels)
        model, other = made
        assert str(normswap.summary(model)) == str(normswap.summary(other))
        state = other.state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", ["LogNormalPrior", "NormalGamma", "MultivariateNormal"])
def test_a_normal_distribution_is_no_norm(name):
    model = nn.Sequential(type(name, (nn.Identity,), {})(), nn.BatchNorm2d(3))
    assert [row.fqn for row in normswap.plan(model, "cn", contexts=2).rows] == ["1"]


@pytest.mark.parametrize("name", ["RMSNorm2", "Normalization", "Normalise", "NormAct", "IBN"])
def test_norms_that_are_not_replaced_are_listed(name):
    model = nn.Sequential(type(name, (nn.Identity,), {})(), nn.BatchNorm2d(3))
    assert [row.fqn for row in normswap.plan(model, "cn", contexts=2).rows] == ["0", "1"]


def set_by_hand(**tensors):
    def change(norm):
        for name, value in tensors.items():
            norm._parameters.pop(name, None), norm._buffers.pop(name, None)
            setattr(norm, name, value)

    return change


ODD = {
    "a mean alone": (set_by_hand(running_var=None), "one of running_mean and running_var"),
    "a variance alone": (set_by_hand(running_mean=None), "one of running_mean and running_var"),
    "no statistics": (set_by_hand(running_mean=None, running_var=None), "no running statistics"),
    "a plain mean": (set_by_hand(running_mean=torch.zeros(3)), "make it a buffer first"),
    "another shape": (
        set_by_hand(weight=nn.Parameter(torch.ones(1, 3, 1, 1))),
        r"its weight is a tensor \(1, 3, 1, 1\)",
    ),
    "another length": (
        set_by_hand(bias=nn.Parameter(torch.ones(5))),
        r"its bias is a tensor \(5,\)",
    ),
    "another device": (
        set_by_hand(weight=nn.Parameter(torch.ones(3, device="meta"))),
        "expected floating-point tensors of one shape",
    ),
}


@pytest.mark.parametrize(("change", "reason"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_norms_whose_tensors_were_set_to_what_is_odd_stay_and_say_why(method, change, reason):
    base = nn.Sequential(nn.BatchNorm2d(3), filled(nn.BatchNorm2d(3)))
    change(base[0])
    model = normswap.convert(base, method)
    assert [type(norm) is nn.BatchNorm2d for norm in model] == [True, False]
    assert re.search(reason, normswap.summary(model).rows[0].reason)


@pytest.mark.parametrize("name", ["weight", "bias", "num_batches_tracked"])
def test_a_tensor_of_a_norm_may_be_none(name):
    base = nn.Sequential(filled(nn.BatchNorm2d(3)))
    setattr(base[0], name, None)
    model = normswap.convert(base, "cn", contexts=2, example_inputs=IMAGES)
    assert normswap.summary(model).verification.largest < 1e-5


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_statistics_that_are_parameters_are_copied(method):
    norm = filled(nn.BatchNorm2d(3))
    set_by_hand(running_mean=nn.Parameter(torch.ones(3)))(norm)
    model = normswap.convert(nn.Sequential(norm), method, example_inputs=IMAGES)
    copy.deepcopy(model)  # which a buffer with a gradient behind it refuses
    with torch.no_grad():  # elsewhere torch refuses
        torch.testing.assert_close(model.eval()(IMAGES), norm.eval()(IMAGES))


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn", "selfnorm"])
def test_channels_are_those_of_the_tensors_where_the_number_is_stale(method):
    """As after channels were cut out of a norm by hand; torch's forward reads no number."""
    norm = filled(nn.BatchNorm2d(3))
    norm.num_features = 7
    model = normswap.convert(nn.Sequential(norm), method, example_inputs=IMAGES)
    torch.testing.assert_close(model.eval()(IMAGES), norm.eval()(IMAGES))


def test_a_number_of_channels_that_is_none_is_said():
    norm = nn.InstanceNorm2d(3)
    norm.num_features = 3.0
    assert "its num_features is 3.0" in read_site("", norm)


def test_what_a_user_set_on_a_norm_hides_no_tensor_of_its_layer():
    base = nn.Sequential(filled(nn.BatchNorm2d(3)))
    base[0].mu, base[0].priors = "text", "text"
    model = normswap.convert(base, "cn-x", contexts=2, example_inputs=IMAGES)
    assert isinstance(model[0].mu, nn.Parameter)
    assert isinstance(model[0].priors, torch.Tensor)
