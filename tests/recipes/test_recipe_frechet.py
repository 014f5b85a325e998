import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from recipes.common.errors import RecipeError
from recipes.common.frechet import (
    ImageNetFeatures,
    Judge,
    frechet_distance,
    imagenet_judge,
    small_judge,
)

CPU = torch.device("cpu")


def cross(spread, mean):
    """Features of exactly this mean and a diagonal covariance, of these variances."""
    count = 2 * len(spread)
    arms = torch.diag(((count - 1) / 2 * torch.tensor(spread, dtype=torch.float64)).sqrt())
    return torch.cat((arms, -arms)) + torch.tensor(mean, dtype=torch.float64)


def test_diagonal_gaussians_have_the_closed_form():
    a = cross([4.0, 1.0, 0.25, 9.0], [0.0, 1.0, 2.0, -3.0])
    b = cross([1.0, 1.0, 4.0, 0.01], [1.0, 1.0, 0.0, 5.0])
    # |m_a - m_b|^2 + sum (s_a - s_b)^2 with standard deviations s.
    expected = (1 + 0 + 4 + 64) + (1 + 0 + 2.25 + 2.9**2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_correlated_gaussians_agree_with_scipy():
    draw = np.random.default_rng(0)
    shapes = draw.normal(size=(2, 6, 6))
    a, b = (draw.normal(size=(n, 6)) @ m + m[0] for n, m in zip((50, 40), shapes, strict=True))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(*map(torch.tensor, (a, b))) == pytest.approx(expected, rel=1e-9)


def test_fewer_images_than_features_have_a_distance():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 30, generator=draw) for n in (10, 12))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


def test_one_feature_is_enough():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [3.0]])
    assert frechet_distance(a, b) == pytest.approx(4 + 2)


def test_features_that_are_not_finite_are_an_error():
    with pytest.raises(RecipeError, match="expected finite features"):
        frechet_distance(torch.full((3, 4), torch.nan), torch.ones(3, 4))


def test_a_judge_counts_what_it_gets_right():
    judge = Judge("toy", nn.Flatten(), lambda features: features.argmax(1), CPU)
    features = judge.features(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 2.0]]]))
    assert judge.accuracy(features, torch.tensor([0, 1, 1])) == pytest.approx(200 / 3, rel=1e-6)


@pytest.mark.parametrize(("make", "classes"), [(small_judge, 2), (imagenet_judge, 3)])
def test_judges_learn_classes(make, classes):
    labels = torch.arange((40 if make is small_judge else 12) * classes) % classes
    shades = torch.linspace(-0.9, 0.9, classes)[labels]
    images = shades[:, None, None, None].expand(-1, 3, 32, 32)
    images = images + 0.05 * torch.randn(*images.shape, generator=torch.Generator().manual_seed(0))
    judge = make(images, labels, classes, CPU)
    assert judge.accuracy(judge.features(images), labels) > 95


def test_a_judge_of_digits_is_the_same_again_and_leaves_the_random_state():
    images, labels = torch.rand(64, 1, 32, 32), torch.arange(64) % 2
    before = torch.get_rng_state()
    first, second = (small_judge(images, labels, 2, CPU).features(images) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_imagenet_features_are_means_over_positions():
    body = ImageNetFeatures().eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        large = nn.functional.interpolate(images, (96, 96), mode="bicubic").clamp(-1, 1)
        x = body.net.conv_stem(large)
        x = body.net.blocks(body.net.bn1(x))
        torch.testing.assert_close(body(images), x.mean((2, 3)))
    assert body(images).shape == (2, 320)
