"""Real ImageNet weights on real photographs: conversion keeps the logits, training moves them."""

import copy

import pytest
import skimage.data
import timm
import torch
from PIL import Image
from torchvision.transforms import functional as transforms

import normswap
from recipes.common.weights import load_efficientnet_lite0

CHELSEA, COFFEE = 285, 967  # Egyptian cat, espresso
FEW = 4


@pytest.fixture(scope="module")
def model():
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    model.load_state_dict(load_efficientnet_lite0(), strict=False)
    return model.eval()


@pytest.fixture(scope="module")
def photos():
    """Return chelsea and coffee: shorter side to 224 px, bicubic; centre; mean and std 0.5."""
    tensors = []
    for photo in (skimage.data.chelsea(), skimage.data.coffee()):
        image = transforms.resize(
            Image.fromarray(photo), 224, interpolation=transforms.InterpolationMode.BICUBIC
        )
        image = transforms.to_tensor(transforms.center_crop(image, 224))
        tensors.append((image - 0.5) / 0.5)
    return torch.stack(tensors)


@pytest.fixture(scope="module")
def logits(model, photos):
    with torch.no_grad():
        return model(photos)


@pytest.fixture(scope="module")
def rounding(model, photos, logits):
    """Return the model's own float32 error against float64."""
    with torch.no_grad():
        wide = copy.deepcopy(model).double()(photos.double())
    return float((logits.double() - wide).abs().max())


@pytest.fixture(scope="module", params=["cn", "cn-x"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def converted(model, method):
    # What verification asks on noise is asked below on photographs.
    settings = {"contexts": ["photo", "art", "sketch"], "priors": [5, 3, 2]}
    return normswap.convert(model, method, verify=False, **settings)


def test_weights_recognise_the_photographs(logits):
    probability, label = logits.softmax(1).max(1)
    assert label.tolist() == [CHELSEA, COFFEE]
    assert probability.tolist() == pytest.approx([0.38, 0.94], abs=0.02)


@pytest.mark.parametrize(
    "labels",
    ["art", ["sketch", "photo"], ["art", None], None],
    ids=str,
)
def test_conversion_keeps_logits_and_top_five(converted, photos, logits, rounding, labels):
    with torch.no_grad():
        actual = converted(photos, context=labels)
    assert float((actual - logits).abs().max()) <= FEW * rounding
    assert actual.topk(5).indices.tolist() == logits.topk(5).indices.tolist()


def test_posterior_keeps_logits_and_top_five(model, method, photos, logits, rounding):
    converted = normswap.convert(
        model, method, contexts=["photo", "art"], unknown="posterior", verify=False
    )
    with torch.no_grad():
        actual = converted(photos)
    assert float((actual - logits).abs().max()) <= FEW * rounding
    assert actual.topk(5).indices.tolist() == logits.topk(5).indices.tolist()


def test_training_one_context_moves_its_logits_and_no_others_statistics(
    converted, method, photos, logits
):
    trained = copy.deepcopy(converted).train()
    norms = [m for m in trained.modules() if isinstance(m, normswap.ContextNorm)]
    before = [m.running_mean.clone() for m in norms]
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(4, 3, 64, 64, generator=generator)
        labels = torch.randint(1000, (4,), generator=generator)
        optimizer.zero_grad()
        outputs = trained(images, context=["art", "sketch", "sketch", "art"])
        torch.nn.functional.cross_entropy(outputs, labels).backward()
        optimizer.step()
    with torch.no_grad():
        actual = trained.eval()(photos, context=["art", "sketch"])
    assert float((actual - logits).abs().max()) > 0.1
    for norm, mean in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean[0], mean[0])
        assert not torch.equal(norm.running_mean[1], mean[1])


def test_checkpoint_of_the_original_restores_it(converted, model, photos, logits, rounding):
    trained = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.9)
    trained.load_state_dict(model.state_dict())
    with torch.no_grad():
        actual = trained(photos, context=["art", None])
    assert float((actual - logits).abs().max()) <= FEW * rounding
