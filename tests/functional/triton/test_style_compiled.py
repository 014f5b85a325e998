"""The kernels of SelfNorm and CrossNorm compile for the GPUs that are in use, without spilling."""

import pytest

pytest.importorskip("triton")

from normswap.functional.triton import exchange, gate
from tests.functional.triton.compiling import compile_kernel


@pytest.mark.parametrize(("architecture", "parts"), [(80, 1), (90, 8)])
def test_the_gate(architecture, parts):
    given = {"BATCH": True, "SB": parts, "BN": 64 // parts, "BC": 8}
    for kernel, more in (
        (gate.gate, {"UPDATE": True}),
        (gate.differentiate, {}),
    ):
        assert compile_kernel(kernel, architecture, **given, **more)[1] == 0, kernel


@pytest.mark.parametrize(
    ("architecture", "dtype", "last", "tile"),
    [(90, "bf16", True, (32, 64)), (80, "fp32", False, (1024, 2))],
)
def test_the_exchange(architecture, dtype, last, tile):
    given = {"CHANNELS": int(last), "SB": 8, "BM": tile[0], "BC": tile[1]}
    for kernel in (exchange.exchange, exchange.differentiate):
        assert compile_kernel(kernel, architecture, dtype, last, **given)[1] == 0, kernel
