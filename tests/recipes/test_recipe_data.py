import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes.common.augment import Augmentation, AugMix, cut_windows, draw_windows
from recipes.common.data import DomainData, Loader, stratified_mask

STILL = Augmentation(side=(1.0, 1.0), shift=0.0, flip=False)


def numbered(count: int, held_out: str | None = None) -> DomainData:
    """Images whose every pixel is their own number; domains a, b, c in turn; the last 3 test."""
    numbers = torch.arange(count)
    return DomainData(
        images=numbers.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4),
        labels=numbers % 5,
        domains=numbers % 3,
        train=numbers < count - 3,
        test=numbers >= count - 3,
        classes=list("vwxyz"),
        domain_names=["a", "b", "c"],
        augmentation=STILL,
        held_out=held_out,
    )


def loader(data: DomainData, batch_size: int = 4) -> Loader:
    # With mean 0 and std 1 / 255 a pixel comes back as its uint8 value.
    return Loader(data, (0.0,) * 3, (1 / 255,) * 3, batch_size, torch.device("cpu"))


def cut(images, how, generator):
    return cut_windows(images, draw_windows(len(images), how, generator))


def numbers_of(batches) -> list[int]:
    return [round(float(image[0, 0, 0])) for batch in batches for image in batch.images]


@pytest.mark.parametrize(("size", "picked"), [(2, 1), (3, 1), (10, 3), (100, 30)])
def test_a_share_of_each_group_is_picked_never_none_nor_all(size, picked):
    groups = torch.tensor([0] * size + [1] * 20)
    mask = stratified_mask(groups, 0.3, torch.Generator().manual_seed(0))
    assert mask[:size].sum() == picked
    assert mask[size:].sum() == 6


def test_an_epoch_holds_each_training_image_at_most_once_and_no_test_image():
    seen = numbers_of(loader(numbered(30)).train_epoch(seed=0, epoch=0))
    assert len(seen) == 24  # 27 train; the last, incomplete batch is dropped
    assert len(set(seen)) == 24
    assert max(seen) < 27


def test_a_set_smaller_than_a_batch_is_one_batch():
    seen = numbers_of(loader(numbered(6), batch_size=64).train_epoch(seed=0, epoch=0))
    assert sorted(seen) == [0, 1, 2]


def test_seed_and_epoch_decide_the_batches():
    source = loader(numbered(30))
    first, again, later, other = (
        numbers_of(source.train_epoch(*key)) for key in ((0, 1), (0, 1), (0, 2), (1, 1))
    )
    assert first == again
    assert first != later
    assert first != other


def test_labels_and_contexts_stay_with_their_images():
    for batch in loader(numbered(30)).train_epoch(seed=0, epoch=0):
        numbers = batch.images[:, 0, 0, 0].round().long()
        assert torch.equal(batch.labels, numbers % 5)
        assert torch.equal(batch.context, numbers % 3)


def test_the_held_out_domain_has_no_context_and_the_others_count_from_zero():
    data = numbered(30, held_out="b")
    assert data.contexts == ["a", "c"]
    assert data.context_of(torch.tensor([0, 1, 2])).tolist() == [0, -1, 1]


def test_images_are_normalised_by_mean_and_std():
    data = numbered(30)
    source = Loader(data, (0.1, 0.2, 0.3), (0.5, 0.25, 0.2), 4, torch.device("cpu"))
    image = source.batch(torch.tensor([20])).images[0, :, 0, 0]
    expected = [(20 / 255 - m) / s for m, s in ((0.1, 0.5), (0.2, 0.25), (0.3, 0.2))]
    torch.testing.assert_close(image, torch.tensor(expected))


def test_a_whole_window_leaves_images_as_they_are():
    images = torch.rand(5, 3, 8, 8)
    result = cut(images, STILL, torch.Generator().manual_seed(0))
    torch.testing.assert_close(result, images, atol=1e-5, rtol=0)


def test_flipping_mirrors_some_images_left_to_right():
    images = torch.rand(32, 3, 8, 8)
    how = Augmentation(side=(1.0, 1.0), shift=0.0, flip=True)
    result = cut(images, how, torch.Generator().manual_seed(0))
    same = ((result - images).abs().amax((1, 2, 3)) < 1e-4).sum()
    mirrored = ((result - images.flip(3)).abs().amax((1, 2, 3)) < 1e-4).sum()
    assert same + mirrored == 32
    assert 5 < mirrored < 27


def test_a_window_inside_the_image_shows_no_black():
    how = Augmentation(side=(0.5, 0.9), shift=0.0, flip=True)
    result = cut(torch.ones(64, 3, 16, 16), how, torch.Generator().manual_seed(0))
    assert result.min() > 0.999


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(6, 3, 4, 4, generator=generator)
    return (255 * F.interpolate(small, size=16, mode="bilinear")).to(torch.uint8)


def test_augmix_is_decided_by_the_generator_and_leaves_other_generators_alone():
    mix = AugMix((0.5, 0.4, 0.3))
    random.seed(3)
    np.random.seed(3)
    first = mix(pictures(), torch.Generator().manual_seed(0))
    drawn = random.random(), np.random.rand()
    random.seed(3)
    np.random.seed(3)
    assert drawn == (random.random(), np.random.rand())
    assert torch.equal(first, mix(pictures(), torch.Generator().manual_seed(0)))
    assert not torch.equal(first, mix(pictures(), torch.Generator().manual_seed(1)))
    assert first.dtype == torch.uint8
    assert first.shape == pictures().shape
    assert not torch.equal(first, pictures())
    # Mixed with itself: still the same pictures.
    assert (first.float() - pictures().float()).abs().mean() < 40


def test_a_loader_mixes_training_images_only_and_gives_all_versions_one_window():
    images = pictures()
    none = torch.zeros(6, dtype=torch.int64)
    every = torch.ones(6, dtype=torch.bool)
    how = Augmentation((0.6, 1.2), 0.2, True)
    data = DomainData(images, none, none, every, every, ["a"], ["x"], how)
    cpu = torch.device("cpu")

    def inverted(x, generator):
        return 255 - x

    loader = Loader(data, (0.5,) * 3, (0.5,) * 3, 3, cpu, inverted)
    plain = Loader(data, (0.5,) * 3, (0.5,) * 3, 3, cpu)
    for ours, theirs in zip(loader.train_epoch(0, 0), plain.train_epoch(0, 0), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert theirs.mixed == ()
        assert len(ours.mixed) == 2
        for version in ours.mixed:
            torch.testing.assert_close(version, -ours.images, atol=1e-5, rtol=0)
    assert all(b.mixed == () for b in loader.whole(loader.test_indices(0)))
