"""On a GPU: the host never waits, CUDA graphs replay, results are those of the CPU."""

import copy

import pytest
import torch

import normswap
from tests.support.builders import assert_close, make_batch, make_cn, make_cnx

pytestmark = pytest.mark.gpu
LABELS = torch.tensor([2, 0, 2, 1, 0])
MAKERS = {
    "cn": lambda: make_cn(dtype=torch.float32),
    "cn-x": lambda: make_cnx(dtype=torch.float32),
    "selfnorm": lambda: normswap.SelfNorm(4, init="paper"),
    "crossnorm": lambda: normswap.CrossNorm(p=1.0),
    "acn": lambda: normswap.AdaptiveContextNorm(4, 3),
    "acn instance": lambda: normswap.AdaptiveContextNorm(4, 3, assignment="instance"),
}
EVERY = pytest.mark.parametrize("kind", MAKERS)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def prepare(kind, layout, dtype=torch.float32):
    layer = MAKERS[kind]().cuda().train()
    x = make_batch((5, 4, 6, 6), dtype=dtype).cuda().contiguous(memory_format=layout)
    labels = (LABELS.cuda(),) if kind.startswith("cn") else ()
    return layer, x.requires_grad_(), labels


def step(layer, x, labels):
    y = layer(x, *labels)
    return y, *torch.autograd.grad(y.sin().sum(), (x, *layer.parameters()), allow_unused=True)


@EVERY
@LAYOUTS
def test_the_host_never_waits(kind, layout):
    layer, x, labels = prepare(kind, layout)
    step(layer, x, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x, labels)
        with torch.no_grad():
            layer.eval()(x, *labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_a_step_replays_as_a_cuda_graph(kind):
    if kind == "crossnorm":
        pytest.skip("draws a permutation, whose random state a replay advances")
    layer, x, labels = prepare(kind, torch.contiguous_format)
    reference = copy.deepcopy(layer)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x, labels)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, labels)
    other = make_batch((5, 4, 6, 6), seed=3, dtype=torch.float32).cuda()
    with torch.no_grad():
        x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    expected = step(reference, other.requires_grad_(), labels)
    for a, b in zip(captured, expected, strict=True):
        if b is not None:
            assert_close(a.cpu(), b.cpu(), 1e-4)


@EVERY
@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_equals_that_on_the_cpu(kind, layout, dtype):
    if kind == "crossnorm":
        pytest.skip("draws its permutation on the device")
    layer, x, labels = prepare(kind, layout, dtype)
    expected = step(
        copy.deepcopy(layer).cpu(), x.detach().cpu().requires_grad_(), [t.cpu() for t in labels]
    )
    share = 1e-4 if dtype == torch.float32 else 2**-6
    for a, b in zip(step(layer, x, labels), expected, strict=True):
        if b is not None:
            assert_close(a.cpu(), b, share)
