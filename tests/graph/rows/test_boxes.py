import math
import random

import pytest
import torch

from normswap.functional.style import box_mask, draw_box


@pytest.mark.parametrize("size", [(9,), (4, 4), (8, 7), (5, 6, 7)])
@pytest.mark.parametrize("beta", [0.3, 1.0, 4.0])
def test_boxes_are_inside_the_map_and_larger_than_a_tenth(size, beta):
    for _ in range(200):
        box = draw_box(size, beta)
        assert box.shape == (2, len(size))
        assert box.dtype == torch.int64
        assert all(0 <= a < b <= e for a, b, e in zip(*box.tolist(), size, strict=True))
        area = box_mask(box, size).sum()
        assert area == math.prod((box[1] - box[0]).tolist())
        assert area * 10 > math.prod(size)


def test_the_smallest_box_is_the_first_above_a_tenth():
    for extent, smallest in ((10, 2), (19, 2), (20, 3), (21, 3)):
        areas = [
            int((high - low).item()) for low, high in (draw_box((extent,)) for _ in range(2000))
        ]
        assert min(areas) == smallest


@pytest.mark.parametrize("size", [(1,), (1, 1), (2, 2), (1, 1, 1)])
def test_small_maps_end_with_the_whole_map(size):
    # The published loop never ends on 1x1 and 2x2 maps.
    for _ in range(50):
        assert draw_box(size).tolist() == [[0] * len(size), list(size)]


def published_box(size, beta, generator):
    """The authors' sampling, one try after the other, with Python's generator."""
    while True:
        side = math.sqrt(generator.betavariate(beta, beta))
        low, high, area = [], [], 1.0
        for extent in size:
            half = int(extent * side) // 2
            centre = generator.randrange(extent)
            low.append(max(centre - half, 0))
            high.append(min(centre + half, extent))
            area *= (high[-1] - low[-1]) / extent
        if area > 0.1:
            return low, high


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_boxes_are_distributed_as_the_published_ones(beta):
    torch.manual_seed(0)
    generator, size, count = random.Random(0), (8, 6), 4000
    ours = torch.stack([draw_box(size, beta) for _ in range(count)]).double()
    theirs = torch.tensor([published_box(size, beta, generator) for _ in range(count)]).double()
    # Every moment up to the second of the four corners, within five standard errors.
    for power in (1, 2):
        a, b = ours.flatten(1) ** power, theirs.flatten(1) ** power
        error = ((a.var(0) + b.var(0)) / count).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()
    a, b = ((t[:, 1] - t[:, 0]).prod(1) for t in (ours, theirs))
    assert (a.mean() - b.mean()).abs() < 5 * ((a.var() + b.var()) / count).sqrt()


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_boxes_follow_the_generator(beta):
    draw = lambda: draw_box((30, 30), beta)  # noqa: E731
    torch.manual_seed(1)
    first = [draw().tolist() for _ in range(5)]
    torch.manual_seed(1)
    assert first == [draw().tolist() for _ in range(5)]
    own = [torch.Generator().manual_seed(3) for _ in range(2)]
    state = torch.get_rng_state()
    boxes = [draw_box((30, 30), beta, generator=g) for g in own]
    assert torch.equal(*boxes)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("beta", [1e-3, 1e4])
def test_extreme_betas_give_boxes(beta):
    for _ in range(50):
        box = draw_box((16, 16), beta)
        assert 10 * box_mask(box, (16, 16)).sum() > 256
