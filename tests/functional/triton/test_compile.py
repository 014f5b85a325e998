"""Kernels compile for GPUs that are not here, keep to registers and read 16 bytes at once."""

import pytest

pytest.importorskip("triton")
from normswap.functional.triton import cn_kernels, cnx_kernels, posterior_kernels, tile
from normswap.functional.triton.plan import cut_contexts
from tests.functional.triton.compiling import compile_kernel

ROWS = {"BN": 64, "BC": 16}
KNOWN = dict.fromkeys(("known_mean", "known_var"))
RUNNING = KNOWN | dict.fromkeys(("part_mean", "part_var", "order", "offsets", "rates"))
POOLED = KNOWN | dict.fromkeys(("weights", "centre"))
OVER_X = [
    (tile.stats, {"index": None}),
    (tile.stats, {}),
    (tile.apply, {}),
    (tile.apply, {"centre": None, "index": None}),
    (tile.dots, {}),
    (tile.dots, {"dx": None, "scale": None}),
    (tile.combine, {}),
    (cn_kernels.apply_and_move, {}),
]
OVER_TABLES = [
    (tile.merge, {}),
    (cn_kernels.tables, {}),
    (cn_kernels.tables, KNOWN | {"momentum": None}),
    (cn_kernels.tables, RUNNING),
    (cn_kernels.pull, {}),
    (cn_kernels.pull, POOLED),
    (cn_kernels.pull, POOLED | {"spread": None, "constant": None}),
    (cnx_kernels.tables, {}),
    (cnx_kernels.tables, {"offsets": None, "weight": None, "bias": None}),
    (cnx_kernels.pull, {}),
    (cnx_kernels.pull, {"dweight": None, "dbias": None}),
]
OVER_CONTEXTS = [
    (posterior_kernels.weigh, {}),
    (posterior_kernels.weigh, {"index": None}),
    (posterior_kernels.pull_weights, {}),
]
# Layout and tile as `plan` has them: channels last, large and small maps, and one position.
CUTS = [("bf16", True, 32, 64), ("fp32", False, 1024, 2), ("fp16", False, 64, 32)]
ARCHITECTURES = pytest.mark.parametrize("architecture", [80, 90])


@ARCHITECTURES
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_kernels_over_x(architecture, cut):
    x_type, last, rows, columns = cut
    for kernel, given in OVER_X:
        given = {"BM": rows, "BC": columns} | given
        registers, spilled, widths = compile_kernel(kernel, architecture, x_type, last, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel  # four programs of four warps fit into a multiprocessor
        assert 128 in widths, kernel


@ARCHITECTURES
def test_kernels_over_tables(architecture):
    for kernel, given in OVER_TABLES:
        registers, spilled, _ = compile_kernel(kernel, architecture, **ROWS, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel


@ARCHITECTURES
@pytest.mark.parametrize("contexts", [2, 3, 16, 64])
def test_kernels_over_contexts(architecture, contexts):
    cut = cut_contexts(contexts, 2048)
    cut["warps"] = cut.pop("num_warps")
    for kernel, given in OVER_CONTEXTS:
        registers, spilled, widths = compile_kernel(kernel, architecture, **cut, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel
        assert 128 in widths, kernel
