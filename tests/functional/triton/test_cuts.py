"""How x is cut: every position once, by shapes alone, with offsets that fit."""

import pytest
import torch

from normswap.functional.triton.plan import plan, serves

SHAPES = [
    *((256, 64, 112, 112), (32, 2048, 7, 7), (2, 3, 1000, 1000), (1, 1, 5, 5), (8, 70, 1, 1)),
    *((1, 64, 512, 512, 512), (70000, 70000, 3, 3), (4, 64, 9), (3, 6, 2**14, 2**15)),
]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cut_covers_x_and_its_numbers_fit(shape, last):
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    if last and x.dim() > 3:
        x = x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    cut = plan(x)
    rows, columns = cut.blocks.values()
    positions = x[0, 0].numel()
    assert (cut.splits - 1) * cut.part < positions <= cut.splits * cut.part
    assert cut.part % rows == 0
    assert rows * columns <= 2048
    assert rows & (rows - 1) == columns & (columns - 1) == 0
    strides = cut.geometry[2:5]
    last_index = (shape[0] - 1, positions - 1, shape[1] - 1)
    reached = sum(i * s for i, s in zip(last_index, strides, strict=True))
    assert reached == x.numel() - 1
    # Offsets within a tile are int32.
    assert (rows - 1) * strides[1] + (columns - 1) * strides[2] < 2**31
    assert serves(x) == (cut.programs < 2**31)


def test_a_small_batch_of_large_maps_keeps_a_gpu_busy():
    assert 500 < plan(torch.empty(2, 64, 256, 256, device="meta")).programs < 1100


def test_what_would_not_fit_is_not_served():
    assert not serves(torch.empty(1, 1, 2**15, 2**15, device="meta"))
