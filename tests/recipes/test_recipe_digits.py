import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits as sklearn_digits

from recipes.common import digits


@pytest.fixture
def quarter_turns(monkeypatch):
    """Domains that can be turned back exactly, so that a digit is recognised at every angle."""
    monkeypatch.setattr(digits, "ANGLES", (0, 90, 180, 270))
    data = digits.load_digits(size=16)
    upright = torch.stack(
        [
            torch.rot90(image[0], -int(domain))
            for image, domain in zip(data.images, data.domains, strict=True)
        ]
    )
    return data, [digit.numpy().tobytes() for digit in upright]


def test_rotation_by_a_right_angle_equals_rot90():
    images = torch.rand(3, 2, 16, 16)
    turned = digits.rotate(images, 90)
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("angle", [30, 60, -17])
def test_rotation_equals_scipy_inside_the_frame(angle):
    image = ndimage.gaussian_filter(np.random.default_rng(0).random((33, 33)), 2)
    turned = digits.rotate(torch.tensor(image)[None, None].float(), angle)[0, 0].numpy()
    expected = ndimage.rotate(image, angle, reshape=False, order=1)
    np.testing.assert_allclose(turned[8:25, 8:25], expected[8:25, 8:25], atol=1e-4)


def test_turning_a_digit_cuts_off_next_to_nothing():
    upright = digits.draw(torch.tensor(sklearn_digits().images).float(), 32)
    ink = upright.sum()
    for angle in digits.ANGLES:
        assert digits.rotate(upright, angle).sum() > 0.98 * ink


def test_no_test_digit_is_trained_on_at_any_angle(quarter_turns):
    data, identity = quarter_turns
    trained = {identity[i] for i in data.train.nonzero().flatten()}
    tested = {identity[i] for i in data.test.nonzero().flatten()}
    assert len(tested) > 500
    assert not trained & tested


def test_each_training_digit_is_shown_at_one_angle_only(quarter_turns):
    data, identity = quarter_turns
    trained = [identity[i] for i in data.train.nonzero().flatten()]
    assert len(trained) > 1200
    assert len(set(trained)) == len(trained)


def test_every_domain_tests_the_same_digits(quarter_turns):
    data, identity = quarter_turns
    tested = [
        {identity[i] for i in (data.test & (data.domains == domain)).nonzero().flatten()}
        for domain in range(4)
    ]
    assert tested[0] == tested[1] == tested[2] == tested[3]


def test_labels_stay_with_their_digits(quarter_turns):
    data, identity = quarter_turns
    source = sklearn_digits()
    drawn = digits.draw(torch.tensor(source.images).float(), 16)[:, 0]
    drawn = (drawn * 255).round().to(torch.uint8)
    label_of = {
        digit.numpy().tobytes(): int(label)
        for digit, label in zip(drawn, source.target, strict=True)
    }
    found = [i for i, digit in enumerate(identity) if digit in label_of]
    assert len(found) > 0.99 * len(identity)  # the rest were rounded the other way
    assert all(label_of[identity[i]] == data.labels[i] for i in found)


def test_training_classes_are_even_over_domains():
    data = digits.load_digits(size=16)
    for label in range(10):
        of_class = data.train & (data.labels == label)
        counts = torch.bincount(data.domains[of_class], minlength=4)
        assert counts.max() - counts.min() <= 1


def test_held_out_angle_does_not_train_and_the_others_take_its_digits():
    all_angles = digits.load_digits(size=16)
    data = digits.load_digits(size=16, held_out="60")
    assert not (data.train & (data.domains == 2)).any()
    assert data.train.sum() == all_angles.train.sum()


def test_another_seed_gives_another_split():
    first, second = (digits.load_digits(size=16, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.images, second.images)


def test_other_angles_are_other_domains():
    data = digits.load_digits(32, limit=200, angles=(0, 45))
    assert data.domain_names == ["0", "45"]
    assert data.test[data.domains == 0].sum() == data.test[data.domains == 1].sum()
    ours, theirs = (data.images[data.test & (data.domains == d)][:, :1] for d in (0, 1))
    torch.testing.assert_close(
        digits.rotate(ours.float() / 255, 45).clamp(0, 1), theirs.float() / 255, atol=0.005, rtol=0
    )
