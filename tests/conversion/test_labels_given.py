"""Labels as an argument or by `use_context`, on small models with known answers."""

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextError, MissingContextError
from tests.support.nets import Net, images


def scatter(model, scale=0.3):
    """Move every per-context tensor of a converted model by its own random amount."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNorm | normswap.ContextNormX):
                for tensor in layer.state_dict().values():
                    if tensor.is_floating_point() and tensor.dim() == 2:
                        tensor.add_(scale * torch.rand_like(tensor))
    return model


def test_use_context_reaches_every_entry_and_nests():
    model = scatter(normswap.convert(Net().eval(), "cn", contexts=["a", "b"]))
    x, labels = images(), torch.tensor([0, 1, 1, 0, 0, 1])
    expected = model(x, context=labels)
    with normswap.use_context(model, labels):
        assert model(x).equal(expected)
        assert model.head(model.features(x)).equal(expected)
        with normswap.use_context(model, "b"):
            assert model(x).equal(model(x, context="b"))
        with normswap.use_context(model, None):
            unknown = model(x)
        assert model(x).equal(expected)
    assert model(x).equal(unknown)
    assert not unknown.equal(expected)


def test_use_context_ends_when_the_block_raises():
    model = scatter(normswap.convert(Net().eval(), "cn", contexts=2))
    x = images()
    unknown = model(x)
    with pytest.raises(RuntimeError), normswap.use_context(model, 1):
        raise RuntimeError
    assert model(x).equal(unknown)


def test_use_context_checks_the_labels_at_once():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(ContextError, match=r"in \[0, 2\)"):
        with normswap.use_context(model, torch.tensor([2])):
            pass


def test_training_without_labels_names_the_argument_and_use_context():
    model = normswap.convert(Net().train(), contexts=2)
    with pytest.raises(MissingContextError, match=r"context=.*normswap\.use_context"):
        model(images())


def test_wrong_number_of_labels_names_the_first_norm():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(
        ContextError, match=r"with 6 labels, one per sample, got 3 \(first norm: norm\)"
    ):
        model(images(), context=torch.zeros(3, dtype=torch.int64))


def test_one_label_in_a_tensor_is_not_the_whole_batch():
    model = normswap.convert(Net(), contexts=2)
    with pytest.raises(ContextError, match="with 6 labels, one per sample, got 1"):
        model(images(), context=torch.tensor([1]))
    model.eval()
    assert model(images(), context=torch.tensor(1)).shape == (6, 5)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, one, other):
        return self.net(one) + self.net(other)


def test_as_many_labels_as_arguments_is_not_a_batch():
    with pytest.raises(ContextError, match="with 6 labels, one per sample, got 2"):
        normswap.convert(Pair(), contexts=2)(images(), images(), context=torch.tensor([0, 1]))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, images):
        return self.net(torch.stack(images))


def test_a_list_of_images_counts_as_the_batch():
    model = scatter(normswap.convert(Listed().eval(), "cn", contexts=2))
    x = images(2)
    labels = torch.tensor([0, 1])
    assert model(list(x), context=labels).equal(model.net(x, context=labels))
