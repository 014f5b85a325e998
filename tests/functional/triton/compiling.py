"""Compiles kernels for GPUs that are not here, with the assembler that Triton brings."""

import re
import subprocess
from inspect import signature as signature_of

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from normswap.functional.triton.launching import OPTIONS

INT64 = {"index", "rows", "batches", "permutation", "inverted"}
INT32 = {"M", "N", "K", "R", "S", "PART", "T", "TILES", "P", "si", "low", "high"}
FLOAT32 = {"eps", "momentum", "factor", "least", "most", "height"}
FLOAT64 = {"moments"}
STRIDES = {"C", "stride", "sn", "sm", "sc"}


def describe(kernel, x_type, last, given):
    """Return signature, constants and what divides by 16, as a launch on large maps has them.

    Args:
        kernel: the function.
        x_type: "bf16", of x and what has its size.
        last: whether channels are last.
        given: constants by name; None where a tensor is left out.
    """
    signature, constants, divisible = {}, {}, {}
    unit = "sc" if last else "sm"
    for at, name in enumerate(kernel.arg_names):
        if name in given or name == unit:
            signature[name], constants[(at,)] = "constexpr", given.get(name, 1)
            continue
        if name in FLOAT32:
            signature[name] = "fp32"
            continue
        if name in INT32 | STRIDES:
            signature[name] = "i32"
        else:
            kind = x_type if name in ("x", "y", "dy", "dx") else "fp32"
            kind = "i64" if name in INT64 else "fp64" if name in FLOAT64 else kind
            signature[name] = "*" + kind
        if name not in INT32 or name in ("M", "PART"):
            divisible[(at,)] = [["tt.divisibility", 16]]
    return signature, constants, divisible


def compile_kernel(kernel, architecture, x_type="bf16", last=True, warps=4, **given):
    """Return registers, bytes spilled, and the widths in bits of reads from memory."""
    signature, constants, divisible = describe(kernel, x_type, last, given)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", architecture, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": warps, **OPTIONS}).asm["ptx"]
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    given = [architecture][: len(signature_of(get_ptxas).parameters)]  # one for all in torch 2.9
    command = [get_ptxas(*given).path, "-v", "--gpu-name", target, "-o", "/dev/null", "-"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    reads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return registers, spilled, {int(n or 1) * int(bits) for n, bits in reads}
