"""Answers of the context that is surest."""

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import ConversionError
from tests.support.builders import make_batch, random_


def make_model(head=True):
    layers = [nn.BatchNorm2d(4, dtype=torch.float64), nn.Conv2d(4, 5, 1, dtype=torch.float64)]
    if head:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = normswap.convert(nn.Sequential(*layers), "cn", contexts=3).eval()
    for seed, name in enumerate(("weight", "bias", "running_mean")):
        random_(getattr(model[0], name), seed, -3, 3)
    return model


@pytest.mark.parametrize("head", [True, False])
def test_each_sample_is_answered_by_the_surest_context(head):
    model, x = make_model(head), make_batch((7, 4, 3, 3))
    logits, chosen = normswap.most_confident(model, x)
    for n in range(7):
        each = [model(x[n : n + 1], context=k)[0] for k in range(3)]
        sure = [y.softmax(0).amax(0).mean().item() for y in each]
        assert int(chosen[n]) == sure.index(max(sure))
        torch.testing.assert_close(logits[n], each[sure.index(max(sure))])
    assert len(chosen.unique()) > 1


def test_a_forward_of_the_users_own():
    model, x = make_model(), make_batch((7, 4, 3, 3))
    expected = normswap.most_confident(model, x)
    found = normswap.most_confident(model, {"image": x}, lambda model, b: model(b["image"]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_errors_say_what_is_expected():
    x = make_batch((2, 4, 3, 3))
    other = normswap.convert(nn.Sequential(nn.BatchNorm2d(4, dtype=torch.float64)), "acn")
    with pytest.raises(ConversionError, match="takes contexts"):
        normswap.most_confident(other, x)
    with pytest.raises(ConversionError, match="logits"):
        normswap.most_confident(make_model(), x, lambda model, batch: {"out": model(batch)})
