"""Kernels compile for GPUs that are not here, keep to registers and read 16 bytes at once."""

import pytest

pytest.importorskip("triton")
from normswap.functional.triton import cn_kernels, learned_kernels, parts, tile
from normswap.functional.triton.plan import cut_contexts
from tests.functional.triton.compiling import compile_kernel
from tests.support.sampling import sampled

ROWS = {"BN": 64, "BC": 16}
NONE_WEIGH = {"KP": 0, "WN": 1, "WC": 1}
TRAINING = {"BATCH": True, "SORTED": True}
RUNNING = {"part_stats": None, "rows": None, "BATCH": False, "SORTED": False}
TOGETHER = {"scale": None, "stride": None}
OVER_X = [
    (tile.stats, {"index": None}),
    (tile.stats, {}),
    (tile.apply, {"R": None}),
    (tile.apply, {"R": None, "centre": None, "index": None}),
    (tile.dots, {"R": None}),
    (tile.dots, {"R": None, "dx": None, "scale": None}),
    (tile.combine, {"R": None}),
    (tile.apply, {"scale": None, "shift": None}),
    (tile.apply, {"scale": None, "shift": None, "index": None}),
    (tile.dots, TOGETHER | {"dx": None}),
    (tile.combine, TOGETHER | {"constant": None}),
    (cn_kernels.apply_and_move, {}),
]
OVER_TABLES = [
    (parts.merge, {}),
    (cn_kernels.tables, NONE_WEIGH | TRAINING),
    (cn_kernels.tables, NONE_WEIGH | TRAINING | {"momentum": None}),
    (cn_kernels.tables, NONE_WEIGH | RUNNING),
    (cn_kernels.gradients, NONE_WEIGH | {"MOVES": True, "WEIGHED": False}),
    (cn_kernels.gradients, NONE_WEIGH | {"MOVES": False, "WEIGHED": False}),
    (learned_kernels.tables, NONE_WEIGH),
    (learned_kernels.tables, NONE_WEIGH | {"rows": None, "weight": None, "bias": None}),
    (learned_kernels.gradients, {"MOVES": True, "WEIGHED": True}),
    (learned_kernels.gradients, {"MOVES": False, "WEIGHED": False, "dweight": None, "dbias": None}),
]
OVER_CONTEXTS = [
    (cn_kernels.tables, ROWS | TRAINING),
    (cn_kernels.tables, ROWS | {"rows": None, "BATCH": False, "SORTED": False}),
    (cn_kernels.gradients, ROWS | {"MOVES": True, "WEIGHED": True}),
]
OVER_CONTEXTS_OF_CNX = [(learned_kernels.tables, ROWS), (learned_kernels.weight_gradients, {})]
# Layout and tile as `plan` has them: channels last, large and small maps, and one position.
CUTS = [("bf16", True, 32, 64), ("fp32", False, 1024, 2), ("fp16", False, 64, 32)]
# Every kernel for each tile and number of contexts, and for each of two architectures; the other
# pairs in exhaustive runs.
OF_CUTS = [(90, CUTS[0]), (80, CUTS[1]), (90, CUTS[2]), (80, CUTS[0]), (90, CUTS[1]), (80, CUTS[2])]
OF_CONTEXTS = [(80, 2), (90, 3), (90, 16), (80, 64), (90, 2), (80, 3), (80, 16), (90, 64)]


@pytest.mark.parametrize(("architecture", "cut"), sampled(OF_CUTS, 3), ids=str)
def test_kernels_over_x(architecture, cut):
    x_type, last, rows, columns = cut
    for kernel, given in OVER_X:
        given = {"BM": rows, "BC": columns} | given
        registers, spilled, widths = compile_kernel(kernel, architecture, x_type, last, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel  # four programs of four warps fit into a multiprocessor
        assert 128 in widths, kernel


@pytest.mark.parametrize("architecture", sampled([90, 80], 1))
def test_kernels_over_tables(architecture):
    for kernel, given in OVER_TABLES:
        registers, spilled, _ = compile_kernel(kernel, architecture, **ROWS, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel


def compile_over_contexts(kernels, architecture, contexts):
    cut = cut_contexts(contexts, 2048)
    cut["warps"] = cut.pop("num_warps")
    for kernel, given in kernels:
        registers, spilled, widths = compile_kernel(kernel, architecture, **cut, **given)
        assert spilled == 0, kernel
        assert registers <= 128, kernel
        assert 128 in widths, kernel


@pytest.mark.parametrize(("architecture", "contexts"), sampled(OF_CONTEXTS, 4))
def test_kernels_over_contexts(architecture, contexts):
    compile_over_contexts(OVER_CONTEXTS, architecture, contexts)


@pytest.mark.parametrize(
    ("architecture", "contexts"), sampled(OF_CONTEXTS[2:] + OF_CONTEXTS[:2], 2)
)
def test_kernels_of_cnx_over_contexts(architecture, contexts):
    compile_over_contexts(OVER_CONTEXTS_OF_CNX, architecture, contexts)
