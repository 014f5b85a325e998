"""What `convert` gives back, on small models with known answers."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import VerificationError
from tests.support.nets import Net, images


def test_one_context_by_default_needs_no_label_even_in_training():
    model = normswap.convert(Net().train())
    model(images()).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "mu" in n)


def test_class_attributes_and_other_keys_stay():
    net = Net()
    model = normswap.convert(net, "cn", contexts=3)
    assert isinstance(model, Net)
    assert type(model).__name__ == "Net"
    assert model.num_classes == 5
    assert set(net.state_dict()) <= set(model.state_dict())
    assert model.stem.weight.equal(net.stem.weight)


def test_the_original_is_not_touched_without_inplace():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    normswap.convert(net, contexts=2, example_inputs=images())
    assert type(net) is Net
    assert isinstance(net.norm, nn.BatchNorm2d)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_inplace_returns_the_same_object_converted():
    net = Net()
    assert normswap.convert(net, inplace=True) is net
    assert isinstance(net.norm, normswap.ContextNormX)


def test_forward_keeps_its_signature_and_adds_context_last():
    import inspect

    parameters = inspect.signature(normswap.convert(Net()).forward).parameters
    assert list(parameters) == ["x", "context"]
    assert parameters["context"].default is None


def test_conversion_reports_the_largest_difference_for_every_context():
    model = normswap.convert(Net(), contexts=["a", "b", "c"], example_inputs=images(2))
    verification = normswap.summary(model).verification
    assert set(verification.differences) == {"unknown", "a", "b", "c"}
    assert verification.largest < 1e-5 * verification.scale


def test_verify_finds_a_context_that_computes_something_else():
    net = Net()
    model = normswap.convert(net, "cn", contexts=3, unknown="0")
    assert normswap.verify(model, net, images()).largest < 1e-5
    with torch.no_grad():
        model.norm.running_mean[2] += 1
    with pytest.raises(VerificationError, match="another function for context 2"):
        normswap.verify(model, net, images())


def test_verification_keeps_modes_and_the_generator():
    net = Net().train()
    net.blocks[0].eval()
    state = torch.get_rng_state()
    model = normswap.convert(net, example_inputs=images(2).clone())
    torch.set_rng_state(state)
    assert net.training
    assert model.training
    assert not model.blocks[0].bn.training
    assert int(net.norm.num_batches_tracked) == 0


def test_a_bare_norm_becomes_a_layer():
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean.normal_()
    layer = normswap.convert(norm, "cn", contexts=2)
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(layer(x, torch.tensor([0, 1])), norm(x), atol=1e-6)
    assert normswap.summary(layer).rows[0].fqn == ""


@pytest.mark.parametrize("method", normswap.methods())
def test_what_is_made_in_inference_mode_can_be_trained(method, tmp_path):
    needs = normswap.get_method(method).needs_context
    given = {"context": torch.arange(len(images())) % 2} if needs else {}
    base = Net()
    with torch.inference_mode():
        model = normswap.convert(base, method, **({"contexts": 2} if needs else {}))
        normswap.save(model, tmp_path / "run")
        loaded = normswap.load(base, tmp_path / "run")
        plain = [normswap.revert(model, discard=True)]
        plain += [normswap.specialize(model, 1)] if needs else []
    for made in (model, loaded, *plain):
        made.train()(images(), **({} if made in plain else given)).sum().backward()
        assert any(p.grad is not None for p in made.parameters())
