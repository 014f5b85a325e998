"""What every method that inserts layers promises."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import normswap
from normswap.methods.base import InsertedMethod, get_method
from tests.lifecycle import Lifecycle

METHODS = [n for n in normswap.methods() if isinstance(get_method(n), InsertedMethod)]
EACH = pytest.mark.parametrize("method", METHODS)


def make_model():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=7).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def images(n=4, size=32):
    return torch.randn(n, 3, size, size)


def trained(method, **settings):
    """Return a converted model after a few steps, so that its layers are not the identity."""
    model = normswap.convert(make_model(), method, **settings).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(images(8)).square().mean().backward()
        optimizer.step()
    return model.eval()


@EACH
def test_function_is_kept_bitwise_in_eval(method):
    model = make_model()
    x = images()
    assert normswap.convert(model, method)(x).equal(model(x))


@EACH
def test_contexts_are_refused(method):
    with pytest.raises(normswap.ConversionError, match="takes no contexts"):
        normswap.convert(make_model(), method, contexts=3)


@EACH
@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one_and_in_any_order(method):
    with torch.enable_grad():
        model, x = trained(method).double(), images().double()
    together = model(x)
    apart = torch.cat([model(x[i : i + 1]) for i in range(4)])
    bound = 1e-12 * float(together.abs().max())
    assert float((together - apart).abs().max()) <= bound
    assert float((model(x.flip(0)).flip(0) - together).abs().max()) <= bound


@EACH
def test_copies_pickles_and_state_dicts_compute_the_same(method):
    model, x = trained(method), images()
    expected = model(x)
    assert copy.deepcopy(model)(x).equal(expected)
    assert pickle.loads(pickle.dumps(model))(x).equal(expected)
    fresh = normswap.convert(make_model(), method)
    fresh.load_state_dict(model.state_dict())
    assert fresh(x).equal(expected)


@EACH
def test_a_checkpoint_of_the_original_loads_and_restores_its_function(method):
    original, x = make_model(), images()
    model = normswap.convert(timm.create_model("resnet10t", num_classes=7).eval(), method)
    model.load_state_dict(original.state_dict())
    assert model(x).equal(original(x))


@EACH
def test_copies_share_no_schedule_with_the_original(method):
    model = normswap.convert(make_model(), method)
    clone = copy.deepcopy(model)

    def schedules(root):
        return {id(m.schedule) for m in root.modules() if hasattr(m, "schedule")}

    assert not schedules(model) & schedules(clone)
    assert len(schedules(clone)) == (method != "selfnorm")
    if method != "selfnorm":
        assert id(clone._normswap.schedule) in schedules(clone)


@EACH
def test_modes_and_frozen_parts_stay(method):
    model = make_model().train()
    model.layer2.eval()
    converted = normswap.convert(model, method)
    assert converted.training
    assert all(not m.training for m in converted.layer2.modules())


@EACH
def test_training_gives_every_parameter_a_finite_gradient(method):
    model = normswap.convert(make_model(), method, placement="post").train()
    for _ in range(8):
        model(images(3)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EACH
@pytest.mark.parametrize("training", [False, True])
def test_compiles_as_one_graph(method, training):
    model = trained(method)
    torch._dynamo.reset()
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    y = compiled(x)
    y.sum().backward()
    if not training:
        assert torch.allclose(y, model(x), rtol=1e-4, atol=1e-5)


@EACH
def test_exports(method):
    model, x = trained(method), images()
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), model(x), atol=1e-5)


@EACH
def test_grad_checkpointing_changes_no_gradient(method):
    plain = trained(method).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)
    x = images(8)
    for model in (plain, checkpointed):
        model.zero_grad()
        torch.manual_seed(3)
        (model(x).square().mean() + model(x.flip(0)).sin().mean()).backward()
    pairs = zip(plain.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6) for a, b in pairs)


@EACH
def test_a_container_that_stops_being_traceable_is_an_error_not_a_silent_skip(method):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)
            self.odd = False

        def forward(self, x):
            if self.odd:
                x = torch.stack([row * 2 for row in x])
            return x + self.bn(self.conv(x))

    model = normswap.convert(Block().eval(), method, placement="post")
    model.odd = True
    with pytest.raises(normswap.ConversionError, match="to run as it was traced"):
        model(images().abs())


@pytest.mark.parametrize(
    "method", [n for n in normswap.methods() if not get_method(n).needs_context]
)
class TestEveryLife(Lifecycle):
    pass
