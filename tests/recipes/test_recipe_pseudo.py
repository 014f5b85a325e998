import argparse
import random

import numpy as np
import pytest
import torch

import normswap
from recipes.common import images, methods, training, unlabelled
from recipes.common.data import Loader
from recipes.common.digits import load_digits
from recipes.common.options import of_cell
from recipes.common.unlabelled import Alignment, Views, draw, pseudo_loss
from recipes.common.weights import NARROW, make_backbone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def digits():
    return load_digits(limit=100, angles=(0, 60))


def test_confident_predictions_alone_teach():
    targets = torch.tensor([[0.96, 0.04], [0.6, 0.4], [0.01, 0.99]])
    strong = torch.tensor([[0.3, 1.0], [5.0, -5.0], [2.0, 0.5]], requires_grad=True)
    pseudo = pseudo_loss(targets, strong, 0.95, one_hot=True)
    pseudo.loss.backward()

    def entropy(row, label):
        return float(-np.log(np.exp(row[label]) / np.exp(row).sum()))

    expected = (entropy(np.array([0.3, 1.0]), 0) + entropy(np.array([2.0, 0.5]), 1)) / 3
    assert pseudo.loss.item() == pytest.approx(expected, rel=1e-6)
    assert pseudo.kept.tolist() == [True, False, True]
    assert strong.grad[1].abs().max() == 0
    assert strong.grad[0].abs().min() > 0


def test_soft_targets_stay_probabilities():
    targets, strong = torch.tensor([[0.7, 0.3]]), torch.tensor([[1.0, 2.0]])
    log_p = np.log(np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum())
    expected = -(0.7 * log_p[0] + 0.3 * log_p[1])
    assert pseudo_loss(targets, strong, 0.5, one_hot=False).loss.item() == pytest.approx(expected)


def test_no_gradient_flows_through_the_labels():
    weak = torch.randn(4, 3, requires_grad=True)
    strong = torch.randn(4, 3, requires_grad=True)
    pseudo_loss(weak.softmax(1), strong, 0.0, one_hot=False).loss.backward()
    assert weak.grad is None
    assert strong.grad is not None


def test_alignment_gives_the_target_the_shares_of_the_source():
    torch.manual_seed(0)
    source = torch.tensor([[0.8, 0.1, 0.1]]).repeat(50, 1)
    target = torch.tensor([[0.2, 0.2, 0.6]]).repeat(50, 1)
    align = Alignment(3)
    for _ in range(200):
        aligned = align(source, target)

    torch.testing.assert_close(aligned, source)
    # From one batch on: the running averages, by hand.
    align = Alignment(3, momentum=0.5)
    ours = (1 / 3 + np.array([0.8, 0.1, 0.1])) / 2
    theirs = (1 / 3 + np.array([0.2, 0.2, 0.6])) / 2
    expected = np.array([0.2, 0.2, 0.6]) * ours / theirs
    got = align(source, target)[0]
    np.testing.assert_allclose(got.numpy(), expected / expected.sum(), rtol=1e-5)


def test_batches_pass_over_all_samples_before_any_comes_again():
    rows = draw(torch.arange(7) * 10, 3, 7, torch.Generator().manual_seed(0))
    assert rows.shape == (7, 3)
    for start in (0, 7, 14):
        assert sorted(rows.flatten()[start : start + 7].tolist()) == [0, 10, 20, 30, 40, 50, 60]


def test_a_batch_may_be_larger_than_the_samples():
    rows = draw(torch.arange(2), 5, 2, torch.Generator().manual_seed(0))
    assert rows.flatten().bincount().tolist() == [5, 5]


def test_views_are_decided_by_the_generator_and_leave_other_random_states(digits):
    views = Views(Loader(digits, MEAN, STD, 8, torch.device("cpu")))
    indices = torch.arange(6)
    states = (random.getstate(), np.random.get_state()[1].tolist())
    strong = [views.strong(indices, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]

    assert torch.equal(strong[0], strong[1])
    assert not torch.equal(strong[0], strong[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_plain_views_are_the_normalised_images(digits):
    views = Views(Loader(digits, MEAN, STD, 8, torch.device("cpu")))
    expected = digits.images[3:5].numpy() / 255.0
    expected = (expected - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    np.testing.assert_allclose(
        views.loader.batch(torch.tensor([3, 4])).images.numpy(), expected, atol=1e-6
    )


def test_strong_views_are_further_from_the_image_than_weak_ones(digits):
    views = Views(Loader(digits, MEAN, STD, 8, torch.device("cpu")))
    indices = torch.arange(40)
    generator = torch.Generator().manual_seed(0)
    distance = [
        (view(indices, generator) - views.loader.batch(indices).images).square().mean()
        for view in (views.weak, views.strong)
    ]
    assert distance[1] > 1.5 * distance[0] > 0


def test_each_part_of_a_batch_gets_its_own_context():
    model = make_backbone(NARROW, 4)[0].eval()
    model = normswap.convert(model, "cn-x", contexts=["a", "b"], verify=False)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, normswap.ContextNormX):
                layer.mu.add_(torch.randn_like(layer.mu))
        parts = [torch.randn(n, 3, 32, 32) for n in (2, 3, 1)]
        found = unlabelled.forward(model, parts, (0, 1, 1))
        for part, context, logits in zip(parts, (0, 1, 1), found, strict=True):
            torch.testing.assert_close(logits, model(part, context=context))


def test_the_average_of_the_weights_is_what_is_given_back():
    model = torch.nn.Linear(2, 1)
    options = of_cell(
        argparse.Namespace(lr=0.1, steps=6), weight_decay=0, ema=0.5, seed=0, method="bn"
    )
    seen, notes = [], []

    def step(model, index):
        seen.append(model.weight.detach().clone())
        return model(torch.ones(4, 2)).square().mean(), {"kept": torch.tensor(float(index))}

    averaged, figures = training.fit(model, step, options, notes.append)
    seen.append(model.weight.detach().clone())
    weights = np.stack([w.numpy() for w in seen[1:]])
    expected = weights[0]
    for index, weight in enumerate(weights):
        # Warm-up: the share of the past grows to 1/2 as 1 - n**(-2/3) does.
        decay = 0.0 if index < 2 else min(0.5, 1 - (1 + (index - 1)) ** (-2 / 3))
        expected = decay * expected + (1 - decay) * weight
    np.testing.assert_allclose(averaged.weight.detach().numpy(), expected, rtol=1e-5)
    assert [note["kept"] for note in notes] == [0, 1, 2, 3, 4, 5]
    assert figures["kept"] == 5


def test_a_figure_of_nothing_is_left_out_of_the_mean():
    nothing = {"right": float("nan"), "loss": 1.0}
    found = training.mean_of([nothing, {"right": 4.0, "loss": 3.0}])
    assert found == {"right": 4.0, "loss": 2.0}
    assert training.mean_of([nothing]) == {"loss": 1.0}


def test_every_method_starts_from_the_same_weights_and_function():
    options = argparse.Namespace(model=NARROW, weights="none", image_size=32)
    data = load_digits(limit=100, angles=(0,))
    pictures = torch.randn(4, 3, 32, 32)
    plain, _, _ = images.build(options, data, 1)
    with torch.no_grad():
        expected = plain.eval()(pictures)
        frozen = ("bn-frozen", "cn-frozen")
        for method in ("bn", "cn", "cn-x", "acn", "crossnorm", "selfnorm", "cnsn", *frozen):
            model, _, _ = images.build(options, data, 1)
            model = methods.convert(model, method, ("a", "b"))
            torch.testing.assert_close(model.eval()(pictures), expected)
