"""The kernels of ACN compile for the GPUs that are in use, and keep their values in registers."""

import pytest
import torch

pytest.importorskip("triton")

from normswap.functional.triton import mixture_kernels, mixture_norm, owners
from tests.functional.triton.compiling import compile_kernel

SHAPE = torch.Size((32, 64, 56, 56))
GLUE = {"settle": {"UPDATE": True}, "finish": {"FLOOR": 0.01, "LEARNED": False}}
PASSES = {"masses": {}, "mix": {"UPDATE": True}, "gradient_sums": {}, "differentiate": {}}


@pytest.mark.parametrize(
    ("architecture", "dtype", "last", "components"),
    [(90, "bf16", True, 4), (80, "fp32", False, 32)],
)
def test_nothing_is_spilled(architecture, dtype, last, components):
    cut = mixture_norm._cut(SHAPE, not last, components)
    for name, given in (GLUE | PASSES).items():
        blocks = dict(cut.glue if name in GLUE else cut.blocks)
        warps = blocks.pop("num_warps", 4)
        kernel = getattr(mixture_kernels, name)
        registers, spilled, _ = compile_kernel(
            kernel, architecture, dtype, last, warps, **blocks, **given
        )
        assert spilled == 0, name
        assert registers * warps * 32 <= 65536, name


@pytest.mark.parametrize(("architecture", "components", "rows"), [(90, 32, 8), (80, 4, 64)])
def test_nor_by_instance(architecture, components, rows):
    given = {"FLOOR": 0.01, "K": components, "KP": components, "BN": rows, "SB": 1, "BC": 4}
    for kernel, more in (
        (owners.assign, {"BATCH": True, "UPDATE": True}),
        (owners.differentiate, {"LEARNED": False}),
    ):
        assert compile_kernel(kernel, architecture, **given, **more)[1] == 0, kernel


@pytest.mark.parametrize("components", [1, 4, 32])
@pytest.mark.parametrize("shape", [(256, 64, 112, 112), (32, 2048, 7, 7), (4, 3, 1, 1), (2, 5, 9)])
def test_programs_share_all_tiles_and_are_few(shape, components):
    for contiguous in (True, False)[: len(shape) - 2]:
        cut = mixture_norm._cut(torch.Size(shape), contiguous, components)
        channels, positions, _, _, _, tiles, all_tiles, programs = cut.geometry
        rows, columns = cut.blocks["BM"], cut.blocks["BC"]
        instances = 1 if not contiguous else shape[0]
        assert channels * positions * instances == torch.Size(shape).numel()
        assert (tiles - 1) * rows < positions <= tiles * rows
        assert all_tiles == tiles * instances
        assert 1 <= programs <= all_tiles
        assert rows * columns * cut.blocks["KP"] <= 2048
        # What each reads of all others' sums is little.
        assert cut.programs[0] <= max(264, -(-channels // columns))
