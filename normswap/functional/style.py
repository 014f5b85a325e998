"""Style transfer between instances: the statistics of a map or a box, and CrossNorm on them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from normswap.functional.affine import Affine, Centred
from normswap.functional.backend import triton_for
from normswap.functional.draws import draw_beta
from normswap.functional.glue import ExchangeGlue
from normswap.functional.moments import Moments, compute_dtype, instance_moments
from normswap.functional.stat_maps import stat_affine
from normswap.functional.tables import apply_centred

# Draws of a box: with beta 1 all fail together once in 1e7 times or less often on maps of 4 x 4 and
# larger.
_TRIES = 32


class Style(NamedTuple):
    """Mean and unbiased standard deviation of each channel of each instance; both (N, C)."""

    mean: Tensor
    std: Tensor


def instance_style(x: Tensor, box: Tensor | None = None, eps: float = 1e-5) -> Style:
    """Return each instance's style: ``mean`` and ``sqrt(var + eps)``, var unbiased.

    Args:
        x: (N, C, *), any number of trailing dimensions including none.
        box: restrict the statistics to a box, as `draw_box` returns it.
        eps: added to the variance, under the root. CrossNorm's is 1e-5, SelfNorm's 1e-12.

    Shape:
        mean, std: (N, C), float32 or, for float64 input, float64.

    Returns:
        The style. A map of one position has a std of exactly 0, and no gradient through it; a box
        of one position, whose size the host does not know, has a std of sqrt(eps).
    """
    if box is not None:
        # Whatever the values outside of it are.
        x, dims = x.to(compute_dtype(x)), tuple(range(2, x.dim()))
        inside, count = box_mask(box, x.shape[2:]), box_size(box)
        mean = torch.where(inside, x, 0).sum(dims, keepdim=True) / count.clamp(min=1)
        squares = torch.where(inside, x - mean, 0).square().sum(dims)
        return Style(mean.flatten(1), torch.sqrt(squares / (count - 1).clamp(min=1) + eps))
    return style_of(instance_moments(x), x.shape[2:].numel(), eps)


def style_of(instances: Moments, positions: int, eps: float) -> Style:
    """Return the style of instances of so many positions, given mean and biased variance."""
    if positions < 2:
        return Style(instances.mean, torch.zeros_like(instances.mean))
    unbiased = instances.var * (positions / (positions - 1))
    return Style(instances.mean, torch.sqrt(unbiased + eps))


def box_size(box: Tensor) -> Tensor:
    """Return the number of positions in a box, 0-dim."""
    return (box[1] - box[0]).prod()


def box_mask(box: Tensor, size: Sequence[int]) -> Tensor:
    """Return a bool map of this size, True inside the box."""
    mask = torch.ones((), dtype=torch.bool, device=box.device)
    for axis, extent in enumerate(size):
        place = torch.arange(extent, device=box.device)
        mask = mask.unsqueeze(-1) & (place >= box[0, axis]) & (place < box[1, axis])
    return mask


def draw_box(
    size: Sequence[int],
    beta: float = 1.0,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a random box that covers more than a tenth of a map.

    A ratio r ~ Beta(beta, beta) gives each side ``2 * (floor(sqrt(r) * extent) // 2)``, placed at
    a uniform centre and clipped. All tries are drawn at once and the first that is large enough is
    taken; where none is, the whole map.

    Args:
        size: extents of the map, at least one spatial dimension, each at least 1.
        beta: positive; 1, the authors' setting, makes r uniform.
        device: where to draw; its default generator is used unless one is given.
        generator: of torch, on that device.

    Shape:
        result: (2, D) int64; row 0 is the first position inside, row 1 the first one past it.

    Returns:
        The box. The host never waits for it, and its values decide no shape.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, code ``cn_rand_bbox``.
    Differs from source: torch's generator instead of NumPy's; the tries are bounded (the source
    never returns on maps where every box is empty or too small: 1 x 1, 2 x 2); any number of
    spatial dimensions.
    """
    side = draw_beta(beta, _TRIES, device, generator).sqrt()
    corners, total = [], 1
    for extent in size:
        half = (side * extent).long() // 2
        centre = torch.randint(extent, (_TRIES,), device=device, generator=generator)
        # The whole map is one more try, which is always large enough.
        low = F.pad((centre - half).clamp(min=0), (0, 1), value=0)
        high = F.pad((centre + half).clamp(max=extent), (0, 1), value=extent)
        corners.append(torch.stack([low, high]))
        total *= extent
    boxes = torch.stack(corners, dim=1)
    large = 10 * (boxes[1] - boxes[0]).prod(0) > total
    first = large.int().argmax().reshape(1)
    return boxes.index_select(2, first).squeeze(2)


def cross_norm(
    x: Tensor,
    permutation: Tensor,
    instances: int = 2,
    content_box: Tensor | None = None,
    style_box: Tensor | None = None,
    fire: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Give each channel of x the style of another channel: CrossNorm.

    ``y = (x - mu_A) / sigma_A * sigma_B + mu_B``, with mean and ``sigma = sqrt(var + eps)`` (var
    unbiased) of each instance and channel. Gradients flow through the statistics of A and of B.

    Args:
        x: (N, C, *), any number of trailing dimensions including none.
        permutation: int64, a permutation of the N instances, or of the C channels.
        instances: 2, where B is instance ``permutation[n]``, same channel; or 1, where B is
            channel ``permutation[c]`` of the same instance.
        content_box: rewrite only this box of A, normalised with the box's own statistics.
        style_box: take B's statistics from this box.
        fire: bool, 0-dim; where False, x comes back. For callers that cannot decide on the host.
        eps: added to the variances, under the root.

    Shape:
        x and result: (N, C, *); boxes: (2, D), see `draw_box`.

    Returns:
        A tensor of the shape, dtype and memory format of x; x itself where it is empty or has one
        position, and the values of x where a box has.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 3, code ``cn_op_2ins_space_chan``.
    Differs from source: maps and boxes of one position are left alone (NaN in the source); boxes
    are masks; any number of spatial dimensions; statistics accumulate in float32.
    """
    if x.shape[0] == 0 or x.shape[2:].numel() < 2:
        return x
    axis, positions = 0 if instances == 2 else 1, x.shape[2:].numel()
    for box in (content_box, style_box):
        if box is not None:
            usable = box_size(box) > 1
            fire = usable if fire is None else fire & usable
    if content_box is None:
        given = () if style_box is None else instance_style(x, style_box, eps)

        def glue(instances: Moments, *style: Tensor, replay: bool) -> Affine:
            own = style_of(instances, positions, eps)
            mean, std = (t.index_select(axis, permutation) for t in style or own)
            scale = std / own.std
            if fire is None:
                return Affine(scale, mean)
            return Affine(torch.where(fire, scale, 1), torch.where(fire, mean, own.mean))

        explicit = None
        if fire is None and style_box is None:
            triton = triton_for(x, "exchange", permutation)
            if triton is not None:
                rewritten: Tensor = triton.exchange_styles(x, permutation, axis, eps, glue)
                return rewritten
            explicit = partial(ExchangeGlue, permutation, axis, positions, eps)
        y = stat_affine(x, glue, *given, explicit=explicit)
        # The map of what does not fire is the identity but for rounding about its centre.
        return y if fire is None else torch.where(fire, y, x)
    content = instance_style(x, content_box, eps)
    style = content if content_box is style_box else instance_style(x, style_box, eps)
    mean, std = (t.index_select(axis, permutation) for t in style)
    table = Centred(content.mean, std / content.std, mean)
    identity = Centred(content.mean, torch.ones_like(std), content.mean)
    inside = box_mask(content_box, x.shape[2:])
    if fire is not None:
        table = table.where(fire.expand(x.shape[0]), identity)
        inside = inside & fire
    return torch.where(inside, apply_centred(x, table), x)
