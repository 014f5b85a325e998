"""The per-element mixture forward and its derivative, a few channels at a time.

Only x and tables (K, C) are kept for backward, which computes tau again; nothing of size K * x
exists but for the channels in hand. Per channel, with tau_k = softmax_k(l_k),
l_k = log lambda_k - log sigma_k - z_k^2 / 2, z_k = (x - mu_k) / sigma_k, e_k = x - m_k,
a_k = gain_k / sqrt(v_k + eps) and y = sum_k tau_k a_k e_k + bias::

    dgain_k = sum dy tau_k e_k / sqrt(v_k + eps)      dbias = sum dy
    dm_k = -a_k sum dy tau_k                          dv_k = -a_k sum dy tau_k e_k / (2 (v_k + eps))
    dtau_k = dy a_k e_k + p_k e_k + q_k (e_k^2 - v_k)       with p_k = dm_k / S_k, q_k = dv_k / S_k
    dl_k = tau_k (dtau_k - sum_j tau_j dtau_j)              and S_k = sum tau_k, or p = q = 0 where
    dmu_k = sum dl_k z_k / sigma_k                          m_k, v_k are given, not the batch's
    dlog sigma_k = sum dl_k (z_k^2 - 1)
    dx = sum_k [tau_k (dy a_k + p_k + 2 q_k e_k) - dl_k z_k / sigma_k]
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.functional.backend import is_eager, is_torchs_own, no_autocast, untraced
from normswap.functional.mixture import MASS, Mixture, Normalized, norm_elements_by_formula
from normswap.functional.moments import Moments, compute_dtype
from normswap.functional.tables import differentiate_again, needs_formula, records

# Values of all components in hand at once: what stays in a CPU's cache, what fills a GPU.
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**25


def norm_elements(
    x: Tensor, mixture: Mixture, gain: Tensor, bias: Tensor, given: Moments, eps: float, batch: bool
) -> Normalized:
    """Compute `norm_elements_by_formula` with memory that does not grow with K, and faster.

    Under torch.compile, functorch and forward-mode derivatives, and on subclasses of tensors, the
    formulas themselves run instead.
    """
    if not (is_eager() and is_torchs_own(x)):
        return norm_elements_by_formula(x, mixture, gain, bias, given, eps, batch)
    tensors = (x, *mixture, gain, bias, *given)
    with torch.set_grad_enabled(records(tensors)):
        y, mass, mean, var = _ElementNorm.apply(*tensors, eps, batch)
    return Normalized(y, mass, Moments(mean, var))


def _blocks(x: Tensor, num_components: int) -> Iterator[slice]:
    """Yield ranges of channels."""
    channel = max(x.numel() // max(x.shape[1], 1) * num_components, 1)
    step = max(_BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // channel, 1)
    for start in range(0, x.shape[1], step):
        yield slice(start, min(start + step, x.shape[1]))


def _read(x: Tensor, block: slice, origin: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return some channels of x, (c, positions of all instances), and what was subtracted.

    The origin (c, 1), returned as (c, 1, 1), is the mean unless given: sums of large numbers lose
    small differences.
    """
    part, wide = x[:, block].transpose(0, 1), compute_dtype(x)
    if origin is None:
        origin = torch.sum(part, tuple(range(1, part.dim())), dtype=wide).unsqueeze(1)
        origin /= max(part.numel() // len(part), 1)
    values = part.new_empty(part.shape, dtype=wide)
    torch.sub(part, origin.view(-1, *(1,) * (part.dim() - 1)), out=values)
    return values.view(len(part), -1), origin.unsqueeze(2)


def _write(y: Tensor, block: slice, values: Tensor) -> None:
    part = y[:, block].transpose(0, 1)
    part.copy_(values.view(part.shape))


def _assign(x: Tensor, log_prior: Tensor, mean: Tensor, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return z and tau, (c, K, P), of values (c, P) under tables (c, K, 1)."""
    # Steps of two operands: with a table that is broadcast along positions, addcmul is several
    # times slower than a product and a sum.
    z = (x.unsqueeze(1) - mean).mul_((-log_sigma).exp())
    # From the first component's, as in `from_first`.
    squares = z.square()
    squares = squares.sub_(squares[:, :1].clone())
    return z, squares.mul_(-0.5).add_(log_prior - log_sigma).softmax(1)


def _formula(eps: float, batch: bool, x: Tensor, *tables: Tensor) -> Tensor:
    log_prior, mu, log_sigma, gain, bias, mean, var = tables
    mixture, given = Mixture(log_prior, mu, log_sigma), Moments(mean, var)
    return norm_elements_by_formula(x, mixture, gain, bias, given, eps, batch).y


class _ElementNorm(Function):
    """See the module; tables are (K, C), bias is (C,)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        given, log_prior, mu, log_sigma, gain, bias, mean, var, eps, batch = inputs
        x = given.contiguous()
        y = torch.empty_like(x)
        mass, mean, var = torch.zeros_like(mean), mean.clone(), var.clone()
        # (C, K, 1): channels first, as the blocks are.
        tables = [t.T.unsqueeze(2) for t in (log_prior, mu, log_sigma, gain, mean, var, mass)]
        for block in _blocks(x, mean.shape[0]):
            lp, loc, ls, g, m, v, s = (t[block] for t in tables)
            values, origin = _read(x, block, None if batch else m.mean(1))
            _, tau = _assign(values, lp, loc - origin, ls)
            if batch:
                sums = tau @ torch.stack([torch.ones_like(values), values], 1).mT
                s.copy_(sums[:, :, :1])
                usable, share = s >= MASS, s.clamp(min=MASS)
                m.copy_(torch.where(usable, origin + sums[:, :, 1:] / share, m))
            e = values.unsqueeze(1) - (m - origin)
            owned = tau.mul_(e)
            if batch:
                v.copy_(torch.where(usable, e.mul_(owned).sum(2, keepdim=True) / share, v))
            a = g * torch.rsqrt(v + eps)
            _write(y, block, (a.transpose(1, 2) @ owned).squeeze(1) + bias[block].unsqueeze(1))
        return _like(given, y), mass, mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps, ctx.batch = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *statistics)

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        dy, count = grads[0], 8
        if dy is None:
            return (None,) * (count + 2)
        saved = ctx.saved_tensors  # once: checkpointing unpacks a tensor once a backward
        inputs, statistics = saved[:count], saved[count:]
        needed = ctx.needs_input_grad[:count]
        if needs_formula(dy):
            formula = partial(_formula, ctx.eps, ctx.batch)
            return *differentiate_again(formula, inputs, dy, needed), None, None
        with no_autocast(dy):
            found = _backward(inputs, statistics, ctx.eps, ctx.batch, dy)
        pairs = zip(found, needed, strict=True)
        return (*(grad if wanted else None for grad, wanted in pairs), None, None)


def _backward(
    inputs: tuple[Tensor, ...], statistics: tuple[Tensor, ...], eps: float, batch: bool, dy: Tensor
) -> list[Tensor]:
    """Return the gradients of x and of every table."""
    given, log_prior, mu, log_sigma, gain, _, _, _ = inputs
    x, dy = given.contiguous(), dy.contiguous()
    dx, *dtables, dbias, dmean, dvar = grads = [torch.empty_like(t) for t in (x, *inputs[1:])]
    columns = [t.T.unsqueeze(2) for t in (log_prior, mu, log_sigma, gain, *statistics)]
    targets = [t.T for t in (*dtables, dmean, dvar)]
    for block in _blocks(x, mu.shape[0]):
        lp, loc, ls, g, s, m, v = (t[block] for t in columns)
        values, origin = _read(x, block, None if batch else m.mean(1))
        grad, _ = _read(dy, block, origin.new_zeros(1, 1))
        m, loc = m - origin, loc - origin
        z, tau = _assign(values, lp, loc, ls)
        e = values.unsqueeze(1) - m
        invstd = torch.rsqrt(v + eps)
        a = g * invstd
        sums = tau @ torch.stack([grad, grad * values], 1).mT
        dm = -a * sums[:, :, :1]
        dg = (sums[:, :, 1:] - m * sums[:, :, :1]) * invstd
        dv = -0.5 * g * invstd.square() * dg
        p = q = torch.zeros_like(s)
        if batch:
            usable = s >= MASS
            p, q = (torch.where(usable, d / s.clamp(min=MASS), 0) for d in (dm, dv))
            dm, dv = (torch.where(usable, 0, d) for d in (dm, dv))
        dtau = grad.unsqueeze(1) * a
        if batch:
            dtau = dtau.add_(p).add_(e * q).mul_(e).sub_(q * v)
        else:
            dtau = dtau.mul_(e)
        coefficients = torch.cat([a, p - 2 * q * m, 2 * q], 2)
        by_dy, constant, by_x = (coefficients.transpose(1, 2) @ tau).unbind(1)
        dlogit = dtau.mul_(tau)
        dlogit = dlogit.addcmul_(tau, dlogit.sum(1, keepdim=True), value=-1)
        total = dlogit.sum(2, keepdim=True)
        pulled = dlogit.mul_(z)
        sums = pulled @ torch.stack([torch.ones_like(values), values], 1).mT
        inverse = (-ls).exp()
        direct = grad.mul(by_dy).add_(constant).addcmul_(by_x, values)
        _write(dx, block, direct.sub_((inverse.transpose(1, 2) @ pulled).squeeze(1)))
        dmu = sums[:, :, :1] * inverse
        dls = (sums[:, :, 1:] - loc * sums[:, :, :1]) * inverse - total
        for target, found in zip(targets, (total, dmu, dls, dg, dm, dv), strict=True):
            target[block].copy_(found.squeeze(2))
        dbias[block].copy_(grad.sum(1))
    return [_like(given, dx), *grads[1:]]


def _like(x: Tensor, y: Tensor) -> Tensor:
    """Return y in the memory format of x."""
    # Blocks of channels are read and written whole, so the work itself is on contiguous tensors.
    return y if x.is_contiguous() else torch.empty_like(x).copy_(y)
