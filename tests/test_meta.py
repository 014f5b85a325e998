"""Models converted without values (meta device), which get the base model's afterwards."""

import pytest
import torch
from torch import nn

import normswap
from tests.graph.behave import images, randomize

METHODS = [name for name in normswap.methods() if hasattr(normswap.get_method(name), "build")]
NORMS = {
    "batch": nn.BatchNorm2d,
    "no affine": lambda n: nn.BatchNorm2d(n, affine=False),
    "cumulative": lambda n: nn.BatchNorm2d(n, momentum=None),
    "instance": nn.InstanceNorm2d,
    "instance affine": lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
}


def make(kind):
    return nn.Sequential(nn.Conv2d(4, 4, 1), NORMS[kind](4), nn.BatchNorm2d(4)).eval()


def convert_empty(kind, method):
    with torch.device("meta"):
        model = make(kind)
    options = {}
    if normswap.get_method(method).needs_context:
        options = {"contexts": 3, "priors": [0.5, 0.3, 0.2]}
    return normswap.convert(model, method, **options)


def fill(converted, base, assign):
    state = base.state_dict()
    if assign:
        converted.load_state_dict(state, assign=True)
        return converted
    converted.to_empty(device="cpu")
    for tensor in (*converted.parameters(), *converted.buffers()):
        tensor.data.fill_(77)  # whatever was in memory
    converted.load_state_dict(state)
    return converted


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", NORMS)
def test_weights_of_the_base_make_it_the_base(kind, method, assign):
    base = make(kind)
    randomize(base)
    converted = fill(convert_empty(kind, method), base, assign)
    tensors = (*converted.parameters(), *converted.buffers())
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    x, expected = images(), base(images())
    torch.testing.assert_close(converted(x), expected, rtol=1e-4, atol=1e-5)
    if normswap.get_method(method).needs_context:
        for label in range(3):
            given = torch.full((4,), label)
            torch.testing.assert_close(converted(x, context=given), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(converted[2].priors, torch.tensor([0.5, 0.3, 0.2]))
    converted.train()(x, **({"context": given} if method != "acn" else {})).sum().backward()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_it_becomes_the_base_again(method, assign):
    base = make("batch")
    randomize(base)
    converted = fill(convert_empty("batch", method), base, assign)
    plain = normswap.specialize(converted, 1)
    assert type(plain[1]) is nn.BatchNorm2d
    torch.testing.assert_close(plain(images()), base(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_resetting_what_has_storage_sets_the_priors(method):
    converted = convert_empty("batch", method).to_empty(device="cpu")
    for module in converted.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    torch.testing.assert_close(converted[1].priors, torch.tensor([0.5, 0.3, 0.2]))
    fresh = normswap.convert(nn.BatchNorm2d(4), method, contexts=3, priors=[0.5, 0.3, 0.2])
    if method == "cn":
        torch.testing.assert_close(converted[1].weight, fresh.weight)


def test_loaded_priors_are_kept_by_a_later_load():
    converted = fill(convert_empty("batch", "cn"), make("batch"), False)
    state = converted.state_dict()
    state["1.priors"] = torch.tensor([0.2, 0.2, 0.6])
    converted.load_state_dict(state)
    converted.load_state_dict(make("batch").state_dict())
    torch.testing.assert_close(converted[1].priors, torch.tensor([0.2, 0.2, 0.6]))
