import random

import numpy as np
import torch
import torch.nn.functional as F

from recipes.common.augment import Augmentation, AugMix
from recipes.common.data import DomainData, Loader


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
