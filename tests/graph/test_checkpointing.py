"""Gradient checkpointing runs a forward twice; running statistics move once."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normswap
from normswap.methods.selfnorm_gate import Gate
from tests.support.builders import assert_close, make_batch
from tests.support.sampling import sampled

METHODS = ["cn", "acn", "selfnorm", "cn-instance"]


def make_layer(method, momentum):
    torch.manual_seed(5)
    if method == "selfnorm":
        layer = normswap.SelfNorm(4, gates=2)
        for gate in (layer.g, layer.f):
            nn.init.uniform_(gate.bn_weight)
            gate.momentum = momentum or 0.3
    elif method == "acn":
        layer = normswap.AdaptiveContextNorm(4, momentum=momentum)
    else:
        norm = nn.BatchNorm2d(4, momentum=momentum)
        if method == "cn-instance":
            norm = nn.InstanceNorm2d(4, momentum=momentum or 0.3, track_running_stats=True)
        layer = normswap.convert(nn.Sequential(norm), "cn", contexts=3)[0]
        nn.init.uniform_(layer.weight)
    return layer.double().train()


def call(layer, x, labels):
    # A sample without a label, and a context with one value, take the running statistics.
    return layer(x) if labels is None else layer(x, labels)


def train(layer, labels, wrap):
    results = []
    for step in range(3):
        x = make_batch((6, 4, 3, 3), seed=step, offset=2.0).requires_grad_()
        y = wrap(lambda x: call(layer, x, labels).sin(), x)
        (y * make_batch((6, 4, 3, 3), seed=9)).sum().backward()
        results.append(x.grad)
    return results


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("momentum", [0.2, None])
@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_and_gradients_are_those_without_checkpointing(
    method, momentum, reentrant
):
    labelled = method.startswith("cn")
    labels = torch.tensor([0, 0, 2, -1, 2, -1]) if labelled else None
    plain = make_layer(method, momentum)
    checked = copy.deepcopy(plain)
    expected = train(plain, labels, lambda f, x: f(x))
    actual = train(checked, labels, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    moved = [name for name, _ in plain.named_buffers() if name.endswith("running_mean")]
    assert moved
    for (name, one), (_, other) in zip(
        checked.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name
    for (name, one), other in zip(checked.named_parameters(), plain.parameters(), strict=True):
        assert_close(one.grad, other.grad), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_in_eval_mode_after_training_takes_the_statistics_of_now(method, reentrant):
    labels = torch.tensor([0, 0, 2, -1, 2, -1]) if method.startswith("cn") else None
    layer = make_layer(method, 0.2)
    train(layer, labels, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    layer.eval()
    expected = train(layer, labels, lambda f, x: f(x))
    actual = train(layer, labels, lambda f, x: checkpoint(f, x, use_reentrant=reentrant))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("method", ["cn", "acn", "selfnorm"])
def test_timm_checkpointing_moves_the_statistics_once(method):
    model = timm.create_model("test_resnet", num_classes=3)
    contexts = {"contexts": 2} if method == "cn" else {}
    plain = normswap.convert(model, method, **contexts, verify=False).train()
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing()
    x = torch.randn(4, 3, 32, 32)
    for one in (plain, checked):
        one(x, context=torch.tensor([0, 1, 0, 1])) if contexts else one(x)
        # A forward without a backward of its own moves them too.
        y = one(x, context=torch.tensor([0, 1, 0, 1])) if contexts else one(x)
        y.square().sum().backward()
    ours = normswap.ContextNorm, normswap.AdaptiveContextNorm, Gate
    names = [name for name, module in plain.named_modules() if isinstance(module, ours)]
    assert names
    for name in names:
        for one, other in zip(
            checked.get_submodule(name).buffers(), plain.get_submodule(name).buffers(), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["cn", "acn", "selfnorm"])
def test_compiled_checkpointing_moves_the_statistics_once(method):
    layer = make_layer(method, 0.2)
    # None unlabelled: torch 2.15 recomputes them from the updated buffers (pytorch#197039).
    labels = torch.tensor([0, 0, 2, 1, 2, 1]) if method == "cn" else None
    plain = copy.deepcopy(layer)
    expected = train(plain, labels, lambda f, x: f(x))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x):
        return checkpoint(lambda x: call(layer, x, labels).sin(), x, use_reentrant=False)

    actual = train(layer, labels, lambda f, x: run(x))
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        assert_close(one.double(), other.double())


# The first decides as inductor does what backward computes again.
@pytest.mark.parametrize("backend", sampled(["aot_eager_decomp_partition", "inductor"], 1))
def test_compiled_training_takes_running_statistics_from_before_the_update(backend):
    labels = torch.tensor([0, 0, 2, -1, 2, -1])
    layer = make_layer("cn", 0.2)
    plain = copy.deepcopy(layer)
    expected = train(plain, labels, lambda f, x: f(x))
    run = torch.compile(lambda x: call(layer, x, labels).sin(), fullgraph=True, backend=backend)
    for one, other in zip(train(layer, labels, lambda f, x: run(x)), expected, strict=True):
        assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_move_once_on_a_gpu(method, reentrant):
    # Backward runs in a thread of the device there.
    labels = torch.tensor([0, 0, 2, -1, 2, -1]).cuda() if method.startswith("cn") else None
    plain = make_layer(method, 0.2).cuda()
    checked = copy.deepcopy(plain)
    x = make_batch((6, 4, 3, 3), offset=2.0).cuda()
    for layer in (plain, checked):
        given = x.clone().requires_grad_()
        if layer is plain:
            y = call(layer, given, labels)
        else:
            y = checkpoint(lambda x: call(checked, x, labels), given, use_reentrant=reentrant)
        y.sin().sum().backward()
    for one, other in zip(checked.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
