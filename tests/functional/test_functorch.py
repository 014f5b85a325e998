"""torch.func on converted models: transforms see the same function as autograd does."""

import pytest
import torch
from torch.func import functional_call, grad, jvp

import normswap
from tests.support.models import ConvNet

METHODS = normswap.methods()
LABELS = torch.tensor([0, 1, 2, -1])


def make(method, **options):
    torch.manual_seed(2)
    contexts = {"contexts": 3} if normswap.get_method(method).needs_context else {}
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
