"""torch.func on converted models: transforms see the same function as autograd does."""

import copy

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import normswap
from tests.models import ConvNet

METHODS = ["cn", "cn-x", "acn", "selfnorm", "cnsn"]
LABELS = torch.tensor([0, 1, 2, -1])


def make(method, **options):
    torch.manual_seed(2)
    contexts = {"contexts": 3} if method.startswith("cn") and method != "cnsn" else {}
    model = normswap.convert(ConvNet().double(), method, verify=False, **contexts, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, {"context": LABELS} if contexts else {}


def images():
    return torch.randn(4, *ConvNet.shape, generator=torch.Generator().manual_seed(1)).double()


def parts(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("unknown", ["pooled", "posterior"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_each_sample_are_those_of_a_loop(method, unknown):
    model, given = make(method, **({"unknown": unknown} if method in ("cn", "cn-x") else {}))
    model.eval()
    parameters, buffers = parts(model)
    x, labels = images(), given.get("context")

    def loss(parameters, image, label):
        kwargs = {"context": label.unsqueeze(0)} if given else {}
        y = functional_call(model, (parameters, buffers), (image.unsqueeze(0),), kwargs)
        return y.square().sum()

    axes = (None, 0, 0 if given else None)
    found = vmap(grad(loss), axes)(parameters, x, labels)
    for index in range(len(x)):
        model.zero_grad()
        kwargs = {"context": labels[index : index + 1]} if given else {}
        model(x[index : index + 1], **kwargs).square().sum().backward()
        for name, parameter in model.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][index], expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_functional_training_step_is_the_step_of_autograd(method):
    model, given = make(method)
    model.train()
    parameters, buffers = parts(model)
    plain = copy.deepcopy(model)

    def loss(parameters, buffers):
        y = functional_call(model, (parameters, buffers), (images(),), given)
        return y.square().sum(), buffers

    torch.manual_seed(0)
    found, moved = grad(loss, has_aux=True)(parameters, buffers)
    torch.manual_seed(0)
    plain(images(), **given).square().sum().backward()
    for name, parameter in plain.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(moved[name], buffer)


# torch's own decompositions for it are scripted when first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_forward_mode_derivatives_are_differences(method):
    model, given = make(method)
    model.eval()
    x, step = images(), 1e-6
    direction = torch.randn_like(x)
    _, found = jvp(lambda x: model(x, **given), (x,), (direction,))
    ahead, behind = (model(x + sign * step * direction, **given) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-5)


def test_a_label_out_of_range_is_an_error_where_it_can_be_read():
    model, _ = make("cn")
    model.eval()
    parameters, buffers = parts(model)

    def loss(parameters):
        kwargs = {"context": torch.tensor([0, 1, 2, 3])}
        return functional_call(model, (parameters, buffers), (images(),), kwargs).sum()

    with pytest.raises(normswap.ContextError, match="from 0 to 3"):
        grad(loss)(parameters)
