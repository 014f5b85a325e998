"""How many kernels Inductor writes for a layer on a CUDA device, without one.

A training step and a forward in evaluation are traced on the CPU, their graphs set to a CUDA device
that is not there, and written as Triton code, which is neither compiled nor run.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.fx_passes.replace_random import replace_random_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

import normswap
from normswap.functional.labels import Context

# As an H100 says of itself.
_DEVICE = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, gcnArchName="", multi_processor_count=132, warp_size=32,
    total_memory=80 << 30, L2_cache_size=50 << 20, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, is_integrated=0,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
)  # fmt: skip
_ANSWERS = {
    "get_device_properties": _DEVICE,
    "get_compute_capability": 90,
    "is_available": True,
    "is_triton_capable": True,
    "raise_if_triton_unavailable": None,
    "current_device": 0,
    "device_count": 1,
}


@contextmanager
def no_device() -> Iterator[None]:
    """Have Inductor write code for a CUDA device where there is none."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    there = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    settings = {"fx_graph_cache": False, "compile_threads": 1}
    settings["triton.autotune_at_compile_time"] = False
    with (
        mock.patch.multiple(CudaInterface, **{n: _answer(v) for n, v in _ANSWERS.items()}),
        mock.patch.object(CudaInterface.Worker, "get_device_properties", _answer(_DEVICE)),
        mock.patch.object(CudaInterface.Worker, "current_device", _answer(0)),
        mock.patch("torch.cuda.get_device_properties", return_value=_DEVICE),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.utils._triton.triton_hash_with_backend", return_value=""),
        mock.patch.object(driver, "_active", there),
        config.patch(settings),
    ):
        yield


def _answer(value: Any) -> Any:
    return staticmethod(lambda *_: value)


def count_kernels(
    method: str | None, options: dict[str, Any], shape: tuple[int, ...], channels_last: bool
) -> dict[str, int]:
    """Return the kernels of a norm in bfloat16: of "forward", "backward" and "eval".

    Args:
        method: what the norm is converted with; None for BatchNorm itself.
        options: of the conversion; with contexts, labels are given, and with `known` the host has
            seen that none is -1, as where `use_context` is entered outside of compiled code.
        shape: of its input, (N, C, H, W).
        channels_last: whether the channels of each position are beside each other in memory.
    """
    found: dict[str, int] = {}
    options = dict(options)
    known = options.pop("known", False)
    layer: nn.Module = nn.Sequential(nn.BatchNorm2d(shape[1]))
    if method is not None:
        layer = normswap.convert(layer, method, verify=False, **options)
    learned = {name for name, _ in layer.named_parameters()}
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    labels = {"context": torch.zeros(shape[0], dtype=torch.int64)} if "contexts" in options else {}
    memory = torch.channels_last if channels_last else torch.contiguous_format

    def run(x: torch.Tensor, labels: dict[str, torch.Tensor], *values: torch.Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        if known:
            labels = {name: Context(t, False, False) for name, t in labels.items()}
        return torch.func.functional_call(layer, given, (x,), labels)

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def compiler(kind: str) -> Any:
        def count(graph: fx.GraphModule, inputs: list[Any]) -> Any:
            found[kind] = _kernels_of(copy.deepcopy(graph), inputs, kind, mode)
            return graph.forward

        return count

    def partition(graph: fx.GraphModule, *given: Any, **settings: Any) -> Any:
        with V.set_fake_mode(mode):
            replace_random_passes(graph)
        return min_cut_rematerialization_partition(graph, *given, **settings)

    with mode:
        values = [torch.empty_like(t, requires_grad=n in learned) for n, t in tensors.items()]
        x = torch.empty(shape, dtype=torch.bfloat16).to(memory_format=memory).requires_grad_()
        for training in (True, False):
            layer.train(training)
            traced = aot_function(
                run,
                fw_compiler=compiler("forward" if training else "eval"),
                bw_compiler=compiler("backward"),
                partition_fn=partition,
                decompositions=select_decomp_table(),
            )
            compiling = mock.patch("torch.compiler.is_compiling", return_value=True)
            with torch.set_grad_enabled(training), compiling:
                y = traced(x, labels, *values)
            if training:
                y.sum().backward()
    return found


def _kernels_of(graph: fx.GraphModule, inputs: list[Any], kind: str, mode: FakeTensorMode) -> int:
    """Return how many kernels, library's included, the code of a graph starts on the device."""
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    moved = [_move(value, mode) for value in inputs]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)
    with V.set_fake_mode(mode):
        post_grad_passes(graph, kind != "backward")
    lowering = GraphLowering(
        graph, example_inputs=moved, is_inference=kind == "eval", is_backward=kind == "backward"
    )
    with (
        V.set_debug_handler(DebugContext()),
        V.set_graph_handler(lowering),
        V.set_fake_mode(mode),
    ):
        lowering.run(*moved)
        written: Any = lowering.codegen()
    code = written[0] if isinstance(written, tuple) else written
    body = getattr(code, "value", code).split("def call")[1]
    return len(re.findall(r"\.run\(|extern_kernels\.\w+\(", body))


def _move(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    with mode:
        size, stride = tuple(value.shape), value.stride()
        found: FakeTensor = torch.empty_strided(size, stride, dtype=value.dtype, device="cuda")  # type: ignore[assignment]
        return found


CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "BatchNorm2d": (None, {}),
    "cn": ("cn", {"contexts": 4}),
    "cn, labels known": ("cn", {"contexts": 4, "known": True}),
    'cn, unknown="pooled"': ("cn", {"contexts": 4, "unknown": "pooled"}),
    'cn, unknown="error"': ("cn", {"contexts": 4, "unknown": "error"}),
    "cn-x": ("cn-x", {"contexts": 4}),
    'cn-x, statistics="batch"': ("cn-x", {"contexts": 4, "statistics": "batch"}),
    "acn": ("acn", {}),
    "selfnorm": ("selfnorm", {"placement": "norm"}),
    "crossnorm": ("crossnorm", {"placement": "norm"}),
    "mixstyle": ("mixstyle", {"placement": "norm"}),
}


def compiled_rows(shape: tuple[int, ...] = (32, 64, 56, 56)) -> list[list[str]]:
    """Return rows of a table: forward + backward / eval, contiguous and channels last."""
    rows = []
    with no_device():
        for name, (method, options) in CASES.items():
            row = [name]
            for channels_last in (False, True):
                found = count_kernels(method, options, shape, channels_last)
                row.append("{forward} + {backward} / {eval}".format(**found))
            rows.append(row)
    return rows
