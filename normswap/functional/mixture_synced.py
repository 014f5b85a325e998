"""The moments of a mixture's components over the batches of several processes."""

from collections.abc import Callable

import torch
from torch import Tensor

from normswap.functional.mixture import MASS, Mixture, responsibilities, rows
from normswap.functional.moments import Moments, combine_moments, compute_dtype, instance_moments


def shared_moments(
    x: Tensor, mixture: Mixture, given: Moments, assignment: str, reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Moments, Tensor]:
    """Return what each component owns of all processes' batches, with one sum over them.

    The moments of this batch are weighed by ``S0 = sum tau`` and combined as ``S0, S1 = S0 m,
    S2 = S0 (v + m^2)``. In plain operators, whose memory grows with the number of components;
    normalising with the result does not.

    Args:
        x: (N, C, *), N may be 0.
        mixture: in the dtype statistics accumulate in.
        given: moments (K, C) of components that own less than a thousandth of a value, and of all
            where the processes together have one value per channel.
        assignment: "channel", "position" or "instance".
        reduce: sums a tensor over processes.

    Returns:
        mass (K, C), moments (K, C), and the values per channel of all batches, ().
    """
    inner: Tensor | None = None
    values = x.to(compute_dtype(x))
    if assignment == "instance":
        values, inner = instance_moments(x)
    dims = (0, *range(2, values.dim()))
    count = x.numel() // max(x.shape[1], 1)
    # A shift of everything changes nothing but rounding.
    origin = (values.sum(dims) / max(values.numel() // max(values.shape[1], 1), 1)).detach()
    values = values - rows(origin.unsqueeze(0), values.dim())[0]
    shifted = mixture._replace(mean=mixture.mean - origin)
    tau = responsibilities(values, shifted, joint=assignment == "position")
    over = tuple(d + 1 for d in dims)
    mass = tau.sum(over).expand_as(given.mean)
    share = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    mean = (tau * values).sum(over) / share
    spread = (values - rows(mean, values.dim())).square()
    spread = spread if inner is None else inner + spread
    local = Moments(mean + origin, (tau * spread).sum(over) / share)
    # The number of values travels with the sums, as one more component.
    number = mass.new_full((1, mass.shape[1]), float(count))
    stacked = Moments(*(torch.cat((t, torch.zeros_like(number))) for t in local))
    total, moments = combine_moments(torch.cat((mass, number)), stacked, reduce, MASS)
    mass, number = total[:-1], total[-1, 0]
    usable = (mass >= MASS) & (number > 1)
    used = Moments(*(t[:-1] for t in moments)).where(usable, given)
    return mass * (number > 1), used, number
