"""A layer that replaces a torch norm: same function, same freezing; the norm's state loads."""

import copy
import inspect

import pytest
import torch
from torch import nn

import normswap
from tests.support.builders import MAKERS, SKEWED, assert_close, make_batch, random_, trained_norm

METHODS = ["cn", "cn-x"]
LABELS = torch.tensor([2, 0, 1, -1, 2, -1, 0])
KINDS = [
    ("BatchNorm1d", (7, 4)),
    ("BatchNorm1d", (7, 4, 5)),
    ("BatchNorm2d", (7, 4, 3, 5)),
    ("BatchNorm3d", (7, 4, 2, 3, 2)),
]


# Older releases of torch have no norm with a weight and no bias.
PARTLY_AFFINE = [{"affine": False}]
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:
    PARTLY_AFFINE.append({"bias": False})


def convert(norm, method, **settings):
    settings = {"contexts": 3, "priors": SKEWED, **settings}
    return normswap.convert(nn.Sequential(norm), method, **settings)


@pytest.mark.parametrize("unknown", ["pooled", "posterior", "1"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_function_is_kept_for_every_label_with_skewed_priors(kind, shape, method, unknown):
    norm, x = trained_norm(kind, dtype=torch.float64), make_batch(shape)
    model = convert(norm, method, unknown=unknown)
    for labels in (LABELS, 0, 1, 2, None):
        assert_close(model(x, context=labels), norm(x))


@pytest.mark.parametrize("priors", [None, [1, 2, 3]])
@pytest.mark.parametrize("method", METHODS)
def test_a_float64_model_is_kept_to_float64_rounding(method, priors):
    norm, x = trained_norm(dtype=torch.float64), make_batch((7, 4, 3, 5))
    model = convert(norm, method, priors=priors, example_inputs=x)
    assert normswap.verify(model, nn.Sequential(norm), x).largest < 1e-14


@pytest.mark.parametrize("settings", PARTLY_AFFINE)
@pytest.mark.parametrize("method", METHODS)
def test_norm_without_some_affine(method, settings):
    norm, x = trained_norm(dtype=torch.float64, **settings), make_batch((7, 4, 3, 5))
    assert_close(convert(norm, method)(x, context=LABELS), norm(x))


@pytest.mark.parametrize("method", METHODS)
def test_synchronised_norm(method):
    norm, x = trained_norm("SyncBatchNorm", dtype=torch.float64), make_batch((7, 4, 3, 5))
    assert_close(convert(norm, method)(x, context=LABELS), norm(x))


def test_cn_scales_both_gamma_and_beta_by_the_root_of_the_prior():
    norm = trained_norm(dtype=torch.float64)
    layer = convert(norm, "cn")[0]
    for k, share in enumerate(SKEWED):
        assert_close(layer.weight[k], share**0.5 * norm.weight)
        assert_close(layer.bias[k], share**0.5 * norm.bias)


def test_cn_keeps_eps_momentum_and_statistics():
    norm = trained_norm(eps=0.3, momentum=None)
    layer = convert(norm, "cn")[0]
    assert (layer.eps, layer.momentum) == (0.3, None)
    assert layer.num_batches_tracked.tolist() == [5, 5, 5]
    for k in range(3):
        assert torch.equal(layer.running_mean[k], norm.running_mean)
        assert torch.equal(layer.running_var[k], norm.running_var)


@pytest.mark.parametrize("momentum", [0.2, None])
def test_cn_goes_on_training_as_the_norm_would_on_one_context(momentum):
    norm = trained_norm(dtype=torch.float64, momentum=momentum).train()
    layer = convert(norm, "cn")[0]
    assert layer.training
    for step in range(3):
        x = make_batch((7, 4, 3, 5), seed=step)
        assert_close(layer(x, torch.full((7,), 2)), norm(x))
    assert_close(layer.running_mean[2], norm.running_mean)
    assert_close(layer.running_var[2], norm.running_var)


def test_cnx_starts_from_the_statistics():
    norm = trained_norm(dtype=torch.float64, eps=0.3)
    layer = convert(norm, "cn-x")[0]
    for k in range(3):
        assert_close(layer.mu[k], norm.running_mean)
        assert_close(layer.log_sigma[k], 0.5 * (norm.running_var + 0.3).log())


def test_cnx_keeps_its_start_in_training():
    norm = trained_norm(dtype=torch.float64)
    layer = convert(norm, "cn-x")[0].train()
    layer(make_batch((7, 4, 3, 5)), LABELS)
    assert_close(layer.mu[0], norm.running_mean)


@pytest.mark.parametrize("kind", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize("method", METHODS)
def test_frozen_affine_stays_frozen(method, kind):
    settings = {"affine": True} if kind == "InstanceNorm2d" else {}
    norm = trained_norm(kind, **settings).requires_grad_(False)
    assert not any(p.requires_grad for p in convert(norm, method).parameters())


@pytest.mark.parametrize("kind", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("method", METHODS)
def test_half_frozen_affine_stays_half_frozen(method, frozen, kind):
    settings = {"affine": True} if kind == "InstanceNorm2d" else {}
    norm = trained_norm(kind, **settings)
    getattr(norm, frozen).requires_grad_(False)
    layer = convert(norm, method)[0]
    for name in ("weight", "bias"):
        assert getattr(layer, name).requires_grad is (name != frozen)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_the_norm_still_run(method):
    norm, seen = trained_norm(), []
    norm.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    model = convert(norm, method)
    model(make_batch((7, 4, 3, 5)).float(), context=LABELS)
    assert seen == [type(model[0])]


@pytest.mark.parametrize("settings", [{}, *PARTLY_AFFINE])
@pytest.mark.parametrize("method", METHODS)
def test_state_of_the_norm_loads_after_training(method, settings):
    norm, x = trained_norm(dtype=torch.float64, **settings), make_batch((7, 4, 3, 5))
    model = convert(norm, method)
    for seed, tensor in enumerate(model[0].state_dict().values()):
        if tensor.dim() == 2:
            random_(tensor, seed, 0.5, 2)
    assert model.load_state_dict(nn.Sequential(norm).state_dict()) == ([], [])
    for labels in (LABELS, None):
        assert_close(model(x, context=labels), norm(x))


@pytest.mark.parametrize("method", METHODS)
def test_loading_does_not_change_the_given_state(method):
    norm = nn.Sequential(trained_norm())
    state = norm.state_dict()
    shapes = {name: value.shape for name, value in state.items()}
    convert(norm[0], method).load_state_dict(state)
    assert {name: value.shape for name, value in state.items()} == shapes


@pytest.mark.parametrize("method", METHODS)
def test_state_without_the_count_of_batches_loads(method):
    norm, x = trained_norm(dtype=torch.float64), make_batch((7, 4, 3, 5))
    state = {k: v for k, v in nn.Sequential(norm).state_dict().items() if "tracked" not in k}
    model = convert(nn.BatchNorm2d(4, dtype=torch.float64).eval(), method)
    model.load_state_dict(state)
    assert_close(model(x, context=LABELS), norm(x))


@pytest.mark.parametrize("method", METHODS)
def test_state_that_lacks_a_statistic_is_refused(method):
    model = convert(trained_norm(), method)
    state = model.state_dict()
    del state["0.running_mean" if method == "cn" else "0.mu"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


@pytest.mark.parametrize("method", METHODS)
def test_state_with_another_number_of_contexts_is_refused(method):
    state = convert(trained_norm(), method, contexts=2, priors=None).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        convert(trained_norm(), method).load_state_dict(state)


@pytest.mark.parametrize("kind", MAKERS)
def test_own_state_round_trip(kind):
    saved, layer = MAKERS[kind](priors=SKEWED), MAKERS[kind]()
    for seed, tensor in enumerate(saved.state_dict().values()):
        if tensor.dim() == 2:
            random_(tensor, seed + 50, 0.5, 2)
    x = make_batch((7, 4, 3, 5))
    expected = copy.deepcopy(saved).eval()(x, LABELS)
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer.eval()(x, LABELS), expected)


@pytest.mark.parametrize("priors", [[0.5, 0.5], [1.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
@pytest.mark.parametrize("kind", MAKERS)
def test_bad_priors_of_a_layer(kind, priors):
    with pytest.raises(normswap.ContextError, match="expected `priors` of 3 positive values"):
        MAKERS[kind](4, 3, priors)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "batch last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_lies_in_memory_as_batch_norms_does(layout, method, training):
    norm = nn.BatchNorm2d(4).train(training)
    x = LAYOUTS[layout](torch.randn(3, 4, 6, 5))
    layer = normswap.convert(norm, method, verify=False)
    assert layer(x).stride() == norm(x).stride()


@pytest.mark.parametrize("method", ["cn", "cn-x", "acn"])
def test_the_input_has_the_name_that_torch_gives_it(method):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=x)

    model, x = ByName().eval(), torch.randn(2, 4, 3, 3)
    for trace in (True, False):
        converted = normswap.convert(model, method, verify=False, trace=trace)
        torch.testing.assert_close(converted(x), model(x))


def share(model, name):
    setattr(model[1], name, getattr(model[0], name))


def hold(model, name):
    model.held = {"tensors": [getattr(norm, name) for norm in model[:2]]}


@pytest.mark.parametrize("tie", [share, hold])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_norm_whose_tensor_is_held_elsewhere_stays_and_the_report_says_so(name, tie):
    model = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(3)))
    tie(model, name)
    converted = normswap.convert(model, "cn", contexts=2, verify=False)
    rows = normswap.summary(converted).rows
    assert [row.action for row in rows] == ["refused", "refused", "replaced"]
    assert rows[0].reason == f"its {name} is tied: another module, or an attribute, holds it, too"
