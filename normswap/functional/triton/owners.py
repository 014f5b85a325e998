"""ACN by Triton where a channel of an instance is assigned as a whole: glue between four passes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from normswap.functional import kernels
from normswap.functional.mixture_start import PRIOR_FLOOR, log_sigma_bounds
from normswap.functional.triton import owners_kernels, sweeps
from normswap.functional.triton.elements import Running, Settings
from normswap.functional.triton.launching import launch
from normswap.functional.triton.plan import plan, power


def _blocks(x: Tensor, components: int) -> dict[str, int | float]:
    wide, parts, narrow = (
        power(components),
        min(power(plan(x).splits), 32),
        min(4, power(x.shape[1])),
    )
    rows = max(min(64 // parts, 1024 // (wide * narrow), power(len(x))), 1)
    sizes = {"K": components, "KP": wide, "SB": parts, "BN": rows, "BC": narrow}
    return {"FLOOR": PRIOR_FLOOR, **sizes}


def forward(inputs: Sequence[Tensor], given: tuple[Running, Settings]) -> tuple[Tensor, ...]:
    """Return y, the moments that components are normalised with, and a table of instances."""
    (x, *parameters), (running, settings) = inputs, given
    cut, blocks = plan(x), _blocks(x, len(parameters[3]))
    channels, (_, _, count) = x.shape[1], running or (None, None, None)
    used = x.new_empty(3, *parameters[3].shape, dtype=torch.float32)
    kept, shift = used.new_empty(3, *x.shape[:2]), used.new_empty(x.shape[:2])
    number = x.numel() // channels
    launch(
        owners_kernels.assign,
        -(-channels // int(blocks["BC"])),
        *(*sweeps.part_stats(x).unbind(), *kept, shift, used),
        *(*parameters, *(running or (None, None, None)), *log_sigma_bounds(settings.eps)),
        *(settings.momentum, number / max(number - 1, 1), settings.eps if running else 0.0),
        *(*cut.shape, cut.splits, cut.part),
        BATCH=settings.batch,
        UPDATE=settings.update,
        **blocks,
    )
    if settings.update and settings.momentum is None and count is not None:
        count.add_(1)
    return sweeps.affine(x, kept[2], shift, kept[0]), used, kept


def backward(
    dy: Tensor,
    inputs: Sequence[Tensor],
    kept: Sequence[Tensor],
    given: tuple[Running, Settings],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients of inputs, given what `forward` returned besides y."""
    (x, weight, _, *assigned), (running, settings) = inputs, given
    used, (centre, squares, scale) = kept
    cut, blocks, dy = plan(x), _blocks(x, used.shape[1]), kernels.match(dy, x)
    sums = sweeps.part_dots(dy, x, centre)[1].unbind()
    spread, constant = torch.empty_like(scale), torch.empty_like(scale)
    found = [torch.empty_like(t) for t in inputs[1:]]
    launch(
        owners_kernels.differentiate,
        -(-x.shape[1] // int(blocks["BC"])),
        *(*sums, centre, squares, used, weight, *assigned, *log_sigma_bounds(settings.eps)),
        *(settings.eps if running else 0.0, spread, constant, *found),
        *(*cut.shape, cut.splits),
        LEARNED=running is None,
        **blocks,
    )
    return [sweeps.combine(dy, x, scale, spread, constant, centre), *found]
