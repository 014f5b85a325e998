"""torch.func, tracers and fake tensors on converted models: all see the function that runs."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, linearize, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import normswap
from tests.support.models import ConvNet

METHODS = normswap.methods()
LABELS = torch.tensor([0, 1, 2, -1])


def make(method, base=None, **options):
    torch.manual_seed(2)
    contexts = {"contexts": 3} if normswap.get_method(method).needs_context else {}
    base = ConvNet().double() if base is None else base
    model = normswap.convert(base, method, verify=False, **contexts, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, {"context": LABELS} if contexts else {}


def images():
    return torch.randn(4, *ConvNet.shape, generator=torch.Generator().manual_seed(1)).double()


def parts(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


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


@pytest.mark.parametrize(
    ("method", "options"), [("cn", {}), ("cn-x", {}), ("cn-x", {"statistics": "batch"})]
)
def test_gradients_of_each_sample_where_no_label_may_be_unknown(method, options):
    model, _ = make(method, unknown="error", **options)
    model.eval()
    parameters, buffers = parts(model)
    labels = LABELS.clamp(min=0)

    def loss(parameters, x, label):
        given = {"context": label[None]}
        return functional_call(model, (parameters, buffers), (x[None],), given).square().sum()

    each = vmap(grad(loss), (None, 0, 0))(parameters, images(), labels)
    model(images(), context=labels).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


# Statistics that are mixed have no gradient, and the style of a partner is drawn anew.
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_several_losses_at_once_are_those_one_by_one(method, training):
    model, given = make(method)
    model.train(training)
    y = model(images(), **given)
    several = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(3)).double()
    how = {"retain_graph": True, "allow_unused": True}
    wanted = list(model.parameters())
    found = torch.autograd.grad(y, wanted, several, is_grads_batched=True, **how)
    each = [torch.autograd.grad(y, wanted, one, **how) for one in several]
    for together, alone in zip(found, zip(*each, strict=True), strict=True):
        assert (together is None) == (alone[0] is None)
        if together is not None:
            torch.testing.assert_close(together, torch.stack(alone), atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*insert a get_attr Node:UserWarning")  # torch's, of constants
@pytest.mark.parametrize("method", METHODS)
def test_what_is_linearized_is_the_derivative(method):
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # each norm is traced anew
    model, given = make(method, base.double())
    model.eval()
    x, direction = images(), images().flip(0)
    y, at = linearize(lambda x: model(x, **given), x)
    _, expected = jvp(lambda x: model(x, **given), (x,), (direction,))
    torch.testing.assert_close(y, model(x, **given))
    torch.testing.assert_close(at(direction), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize("method", ["cn", "cn-x"])
def test_a_graph_of_operators_takes_other_labels(method, mode):
    model, _ = make(method)
    model.eval()
    made = make_fx(
        lambda x, labels: model(x, context=labels),
        tracing_mode=mode,
        _allow_non_fake_inputs=mode == "fake",
    )(images(), LABELS)
    for labels in (LABELS, LABELS.flip(0), torch.zeros_like(LABELS)):
        torch.testing.assert_close(made(images(), labels), model(images(), context=labels))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_fake_tensors_run_and_leave_no_trace(method, training):
    model, given = make(method)
    other, _ = make(method)
    model.train(training), other.train(training)
    calls = [{"context": labels} for labels in ([0, 1, 2, -1], LABELS, "1")] if given else [{}]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [model(mode.from_tensor(images()), **labels) for labels in calls]
    found = []
    for each in (model, other):
        torch.manual_seed(4)
        found.append(each(images(), **given))
    torch.testing.assert_close(*found, atol=0, rtol=0)
    assert {y.shape for y in fake} == {found[0].shape}


def test_no_model_is_converted_where_tensors_are_fake():
    with FakeTensorMode(), pytest.raises(normswap.ConversionError, match="outside of it"):
        normswap.convert(ConvNet(), "cn", contexts=2)
