"""One layer at a time: every method against nn.BatchNorm2d and a loop over contexts."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import normswap
from recipes.bench import Timing, interleave

SHAPES = ((32, 64, 56, 56), (32, 256, 14, 14), (64, 512, 7, 7))
LAYOUTS = {"ct": torch.contiguous_format, "cl": torch.channels_last}
COUNTS = (1, 4, 16, 128)
BASE = "BatchNorm2d"


class LoopNorm(nn.Module):
    """CN as its definition reads: a BatchNorm for each context, in a loop."""

    def __init__(self, channels: int, contexts: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(contexts))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = torch.empty_like(x)
        for k, norm in enumerate(self.norms):
            rows = (labels == k).nonzero().squeeze(1)
            if len(rows):
                y[rows] = norm(x[rows])
        return y


def make_layers(channels: int, counts: Sequence[int]) -> dict[str, tuple[nn.Module, int]]:
    """Return every layer, with the number of contexts of its labels, 0 for none."""
    layers: dict[str, tuple[nn.Module, int]] = {BASE: (nn.BatchNorm2d(channels), 0)}
    for k in counts:
        layers[f"loop K={k}"] = (LoopNorm(channels, k), k)
        layers[f"cn K={k}"] = (normswap.ContextNorm(channels, k), k)
        cnx = normswap.ContextNormX(channels, k)
        cnx.fresh = False
        layers[f"cn-x K={k}"] = (cnx, k)
    layers["selfnorm"] = (normswap.SelfNorm(channels), 0)
    layers["crossnorm"] = (normswap.CrossNorm(p=1.0), 0)
    for assignment in ("instance", "channel"):
        layer = normswap.AdaptiveContextNorm(channels, 4, assignment=assignment)
        layers[f"acn K=4 {assignment}"] = (layer, 0)
    return layers


def _case(
    layer: nn.Module, x: Tensor, labels: tuple[Tensor, ...], training: bool, compiled: bool
) -> Callable[[], object]:
    layer.train(training)
    run = torch.compile(layer, fullgraph=True) if compiled else layer
    cotangent = torch.randn_like(x)
    wanted = [x, *layer.parameters()]

    def forward_and_backward() -> object:
        return torch.autograd.grad(run(x, *labels), wanted, cotangent, allow_unused=True)

    def forward() -> object:
        with torch.no_grad():
            return run(x, *labels)

    return forward_and_backward if training else forward


def bench_layers(
    shape: Sequence[int],
    layout: str,
    training: bool,
    device: torch.device,
    counts: Sequence[int] = COUNTS,
    repeats: int = 20,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Timing]:
    """Return the times of every layer on one shape; `BASE` is never compiled.

    Each compiled layer is an entry of its own for the forward they share, which torch takes for
    recompilations of one.
    """
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        cases = make_cases(shape, layout, training, device, counts, compiled, dtype)
        return interleave(cases, device, repeats)


def make_cases(
    shape: Sequence[int],
    layout: str,
    training: bool,
    device: torch.device,
    counts: Sequence[int] = COUNTS,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[], object]]:
    """Return a step of every layer on one shape, `BASE` first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).to(device, dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    cases = {}
    layers = make_layers(shape[1], counts)
    if compiled:
        layers["BatchNorm2d, compiled"] = (nn.BatchNorm2d(shape[1]), 0)
    for name, (layer, count) in layers.items():
        if (not training and name == "crossnorm") or (compiled and name.startswith("loop")):
            continue
        labels = torch.randint(count, shape[:1], generator=generator) if count else None
        given = () if labels is None else (labels.to(device),)
        apart = compiled and name != BASE
        cases[name] = _case(layer.to(device), x, given, training, apart)
    return cases
