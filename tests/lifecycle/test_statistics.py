"""`update_stats` measures running statistics anew."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

import normswap
from tests.support.builders import assert_close, make_batch
from tests.support.models import ConvNet


def batches(count=3, size=6):
    torch.manual_seed(1)
    return [
        (
            make_batch((size, 3, 6, 6), seed=seed, offset=1.0),
            torch.zeros(size),
            torch.tensor([0, 1, 1, 2, 0, 2, 1, 0])[torch.arange(seed, seed + size) % 8],
        )
        for seed in range(count)
    ]


def test_one_context_equals_torchs_update_bn():
    plain = ConvNet().double()
    converted = normswap.convert(plain, "cn", verify=False)
    update_bn([x for x, _, _ in batches()], plain)
    assert normswap.update_stats(converted, batches()) == {"0": 3}
    for name, module in plain.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            ours = converted.get_submodule(name)
            assert_close(ours.running_mean[0], module.running_mean)
            assert_close(ours.running_var[0], module.running_var)
            assert ours.num_batches_tracked.tolist() == [3]
            assert ours.momentum == 0.1


@pytest.mark.parametrize("form", ["labels", "dict", "forward"])
def test_each_context_averages_over_its_own_samples(form):
    model = normswap.convert(
        nn.Sequential(nn.BatchNorm2d(3)).double(), "cn", contexts=3, verify=False
    )
    data = batches()
    if form == "labels":
        counted = normswap.update_stats(model, data, labels=2)
    elif form == "dict":
        counted = normswap.update_stats(model, [{"input": x, "context": c} for x, _, c in data])
    else:
        counted = normswap.update_stats(
            model, data, forward=lambda model, batch: model(batch[0], context=batch[2])
        )
    assert counted == {"0": 3, "1": 3, "2": 3}
    for context in range(3):
        values = [x[c == context].movedim(1, 0).reshape(3, -1) for x, _, c in data]
        assert_close(model[0].running_mean[context], sum(v.mean(1) for v in values) / 3)
        assert_close(model[0].running_var[context], sum(v.var(1) for v in values) / 3)


def test_a_context_without_samples_keeps_its_statistics_and_is_named():
    model = normswap.convert(ConvNet().double(), "cn", contexts=["a", "b", "c"], verify=False)
    for layer in (m for m in model.modules() if isinstance(m, normswap.ContextNorm)):
        nn.init.uniform_(layer.running_mean)
        layer.num_batches_tracked.fill_(7)
    before = copy.deepcopy(model.neck)
    data = [(x[c < 2], c[c < 2]) for x, _, c in batches()]
    # One batch has a single sample of a, which is no spread at the neck.
    with pytest.warns(UserWarning, match="no batch had two values a channel of c;"):
        assert normswap.update_stats(model, data, labels=1) == {"a": 2, "b": 3, "c": 0}
    assert torch.equal(model.neck.running_mean[2], before.running_mean[2])
    assert model.neck.num_batches_tracked.tolist() == [2, 3, 7]
    assert not torch.equal(model.neck.running_mean[0], before.running_mean[0])


def test_selfnorm_and_instance_norms_average_too():
    model = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    ).double()
    model = normswap.convert(model, "selfnorm", placement="norm", verify=False)
    seen = {m: [] for m in model.modules() if isinstance(m, normswap.SelfNorm)}
    for layer, styles in seen.items():
        layer.register_forward_pre_hook(
            lambda layer, inputs, styles=styles: styles.append(
                (inputs[0].mean((2, 3)), (inputs[0].var((2, 3)) + 1e-12).sqrt())
            )
        )
    data = [x for x, _, _ in batches()]
    normswap.update_stats(model, data)
    assert_close(model[0].running_mean, sum(x.mean((0, 2, 3)) for x in data) / 3)
    assert len(seen) == 2
    for layer, styles in seen.items():
        gate = layer.g
        values = [gate.weight[:, 0] * mean + gate.weight[:, 1] * std for mean, std in styles]
        assert_close(gate.running_mean, sum(z.mean(0) for z in values) / 3)
        assert_close(gate.running_var, sum(z.var(0) for z in values) / 3)
        assert gate.momentum == 0.1


def test_acn_averages_what_its_components_own():
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(3)).double(), "acn", verify=False)
    layer = model[0]
    nn.init.normal_(layer.mu)
    data = [x for x, _, _ in batches()]
    expected = [layer.compute(x, True).moments for x in data]
    normswap.update_stats(model, data)
    assert_close(layer.running_mean, sum(m.mean for m in expected) / 3)


def test_dropout_is_off_and_modes_return():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3)).double().train()
    model = normswap.convert(model, "cn", verify=False)
    x = make_batch((6, 3, 6, 6))
    normswap.update_stats(model, [x])
    assert_close(model[1].running_mean[0], x.mean((0, 2, 3)))
    assert model[0].training
    assert model[1].training


def test_statistics_that_are_not_finite_heal():
    model = normswap.convert(nn.Sequential(nn.BatchNorm2d(3)).double(), "cn", verify=False)
    model[0].running_mean.fill_(torch.nan)
    x = make_batch((6, 3, 6, 6))
    normswap.update_stats(model, [x])
    assert_close(model[0].running_mean[0], x.mean((0, 2, 3)))


def test_a_failing_loader_leaves_the_model_as_it_was():
    model = normswap.convert(ConvNet().double(), "cn", contexts=3, verify=False).train()
    before = copy.deepcopy(model.state_dict())

    def failing():
        yield from batches(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        normswap.update_stats(model, failing(), labels=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.neck.momentum == 0.1
    assert model.neck.training


def test_what_cannot_be_measured_is_refused():
    model = normswap.convert(ConvNet().double(), "cn", contexts=3, verify=False)
    with pytest.raises(normswap.MissingContextError):
        normswap.update_stats(model, batches())
    with pytest.raises(normswap.ConversionError, match="no batch reached"):
        normswap.update_stats(model, [])
    normswap.freeze(model, stats="frozen")
    with pytest.raises(normswap.ConversionError, match="whose running statistics may move"):
        normswap.update_stats(model, batches(), labels=2)
    with pytest.raises(normswap.ConversionError, match="whose running statistics may move"):
        normswap.update_stats(nn.Linear(2, 2), batches())


@pytest.mark.parametrize("method", ["cn-x", "crossnorm"])
def test_a_conversion_without_running_statistics_says_why_nothing_is_measured(method):
    bare = nn.Sequential(nn.InstanceNorm2d(3))
    base, placement = (ConvNet(), None) if method == "cn-x" else (bare, "norm")
    model = normswap.convert(base, method, placement=placement, verify=False)
    before = copy.deepcopy(model.state_dict())
    stream = iter(batches())
    with pytest.warns(UserWarning, match="no layer in .* has running statistics; what CN-X"):
        assert normswap.update_stats(model, stream) == {}
    assert len(list(stream)) == 3
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "labels", "match"),
    [
        (lambda b: b, 3, "a position in batches of 3 items, got 3"),
        (lambda b: b, "x", "a position in batches of 3 items, got 'x'"),
        (lambda b: b[0], 2, "batches as tuples with context labels at position 2"),
        (lambda b: (b[0] * torch.nan, *b[1:]), 2, "values that are not finite enter stem.1"),
    ],
)
def test_batches_that_cannot_count_leave_the_model_as_it_was(spoil, labels, match):
    model = normswap.convert(ConvNet().double(), "cn", contexts=3, verify=False)
    before = copy.deepcopy(model.state_dict())
    given = batches()
    with pytest.raises(normswap.ConversionError, match=match):
        normswap.update_stats(model, [given[0], spoil(given[1])], labels=labels)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
