"""What is clustered: pixels, features of a model, or of a function."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap import ContextError, contexts
from tests.support.clusters import batches, blobs, both


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_labels_do_not_depend_on_the_dtype(find, dtype):
    x = blobs()[0].to(dtype)
    assigner = find(batches(x), 3)
    assert torch.equal(assigner(x), assigner(x.float()))
    assert assigner(x).dtype == torch.int64


def test_bytes_and_floats_of_an_image_are_the_same_pixels(digits):
    assigner = contexts.kmeans(batches(digits[0]), 5)
    pixels = (digits[0] * 255).round().to(torch.uint8)
    assert torch.equal(assigner(pixels), assigner(pixels.float() / 255))


def test_large_images_are_averaged_to_32_pixels():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(80, 3, 96, 64, generator=generator)
    x[::2] *= 0.5
    assigner = contexts.kmeans(batches(x), 2)
    assert assigner.arrays["centers"].shape == (2, 3 * 32 * 32)
    small = x.unflatten(2, (32, 3)).unflatten(4, (32, 2)).mean((3, 5))
    assert torch.equal(assigner(x), assigner(small))


class Net(nn.Module):
    """A backbone in timm's manner."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, 10)

    def forward_features(self, x):
        return self.conv(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_a_model_gives_pooled_features_in_eval_and_stays_as_it_was(digits):
    model = Net().train()
    model.conv[1].eval()
    before = copy.deepcopy(model.state_dict())
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    assert [m.training for m in model.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        pooled = copy.deepcopy(model).eval().conv(digits[0]).mean((2, 3)).double()
    expected = torch.cdist(pooled, assigner.arrays["centers"].double()).argmin(1)
    assert torch.equal(assigner(digits[0]), expected)


def test_a_model_of_half_precision_is_given_its_own_dtype(digits):
    model = Net().to(torch.bfloat16)
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    assert assigner.arrays["centers"].dtype == torch.float32


def test_a_timm_model_gives_its_features_before_the_head(digits):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    x = digits[0][:64].repeat(1, 1, 4, 4)
    assigner = contexts.kmeans(batches(x), 1, features=model)
    assert assigner.arrays["centers"].shape == (1, 512)


def test_a_model_that_was_trained_meanwhile_is_refused(digits):
    model = Net()
    assigner = contexts.kmeans(batches(digits[0]), 4, features=model)
    with torch.no_grad():
        model.conv[0].weight.add_(1)
    with pytest.raises(ContextError, match="has changed since"):
        assigner(digits[0])


def test_a_function_makes_features(digits):
    assigner = contexts.kmeans(batches(digits[0]), 3, features=lambda x: x.flatten(1)[:, :5])
    assert assigner.arrays["centers"].shape == (3, 5)


def test_features_with_positions_are_refused(digits):
    with pytest.raises(ContextError, match=r"expected features \(N, D\) of a batch, got"):
        contexts.kmeans(batches(digits[0]), 3, features=lambda x: x)


def test_features_of_no_kind_are_refused():
    with pytest.raises(ContextError, match="expected features= as"):
        contexts.kmeans([torch.randn(90, 4)], 3, features="colour")


def test_a_model_converts_with_an_assigner(digits):
    x, y = digits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assigner = contexts.kmeans(DataLoader(TensorDataset(x, y), 200), 3)
    model = normswap.convert(Net(), "cn", contexts=assigner, example_inputs=x[:4])
    report = normswap.summary(model)
    assert report.contexts == assigner.names
    assert report.priors == pytest.approx([size / len(x) for size in assigner.sizes])
    model.train()(x[:50], context=assigner(x[:50])).sum().backward()
