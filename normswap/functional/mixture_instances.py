"""A Gaussian mixture that assigns a channel of an instance as a whole, by its mean."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from normswap.functional.affine import Affine
from normswap.functional.glue import GlueGradient, Map
from normswap.functional.mixture import MASS, Mixture, Normalized, from_first, responsibilities
from normswap.functional.moments import Moments
from normswap.functional.stat_maps import stat_affine


def norm_instances(
    x: Tensor, mixture: Mixture, gain: Tensor, bias: Tensor, given: Moments, eps: float, batch: bool
) -> Normalized:
    """Normalise; the channel mean of an instance decides for it.

    Arguments as for `normswap.functional.mixture.norm_elements_by_formula`.
    """
    found: list[tuple[Tensor, Moments]] = []

    def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        log_prior, mu, log_sigma, gain, bias, mean, var = tensors
        origin, instances, mu, mean = _centred(instances, mu, mean)
        tau = responsibilities(instances.mean, Mixture(log_prior, mu, log_sigma))
        used, mass = Moments(mean, var), torch.zeros_like(mean)
        if batch:
            mass = tau.sum(1)
            share = mass.clamp(min=MASS)
            mean = (tau * instances.mean).sum(1) / share
            spread = instances.var + (instances.mean - mean.unsqueeze(1)).square()
            used = Moments(mean, (tau * spread).sum(1) / share).where(mass >= MASS, used)
        if not replay:
            found.append((mass.detach(), Moments(used.mean.detach() + origin, used.var.detach())))
        weight = tau * (gain * torch.rsqrt(used.var + eps)).unsqueeze(1)
        shift = (weight * (instances.mean - used.mean.unsqueeze(1))).sum(0) + bias
        return Affine(weight.sum(0), shift)

    explicit = partial(InstanceMixtureGlue, x.shape[2:].numel(), eps, batch, found)
    y = stat_affine(x, glue, *mixture, gain, bias, *given, explicit=explicit)
    return Normalized(y, *found[0])


def _centred(
    instances: Moments, mu: Tensor, mean: Tensor
) -> tuple[Tensor, Moments, Tensor, Tensor]:
    """Return a point among the instances, (C,), and the rest as seen from there.

    A shift of everything changes nothing but rounding.
    """
    origin = instances.mean.detach().sum(0) / max(instances.mean.shape[0], 1)
    return origin, instances._replace(mean=instances.mean - origin), mu - origin, mean - origin


@dataclass(eq=False)
class InstanceMixtureGlue:
    """The same map with its derivative written out.

    With m, v the moments of an instance, z_k = (m - mu_k) / sigma_k, tau the softmax of
    ``log lambda_k - log sigma_k - z_k^2 / 2``, M_k and V_k the tau-weighted moments of the batch
    (or given), S_k = sum_n tau_k and A_k = gain_k / sqrt(V_k + eps):
    ``y = (x - M_0) sum_k tau_k A_k + bias + sum_k tau_k A_k (M_0 - M_k)``.

    Backward, with D1 = sum dy and D2 = sum dy (x - m): q_k = D2 + D1 (m - M_k);
    dA_k = sum_n tau_k q_k; dM_k = -A_k sum_n tau_k D1; dV_k = -1/2 A_k dA_k / (V_k + eps).
    Where M_k and V_k are the batch's,
    ``dtau_k = A_k q_k + [dM_k (m - M_k) + dV_k (v + (m - M_k)^2 - V_k)] / S_k``,
    ``dv = sum_k tau_k dV_k / S_k``, ``dm = sum_k tau_k [dM_k + 2 dV_k (m - M_k)] / S_k``; the
    softmax gives l_k = tau_k (dtau_k - sum_j tau_j dtau_j), and dm has -sum_k l_k z_k / sigma_k
    besides.

    Args:
        positions: values of a channel of an instance.
        eps: added to the variance.
        batch: whether M_k and V_k are the batch's.
        found: gets the mass of the components and the moments they were normalised with.
    """

    positions: int
    eps: float
    batch: bool
    found: list[tuple[Tensor, Moments]]

    def forward(self, instances: Moments, *tensors: Tensor) -> tuple[Map, Any]:
        """Return the map of each instance, and what `backward` needs."""
        log_prior, mu, log_sigma, gain, bias, mean, var = tensors
        centre = instances.mean
        origin, instances, mu, mean = _centred(instances, mu, mean)
        inverse = log_sigma.neg().exp_().unsqueeze(1)
        z = (instances.mean - mu.unsqueeze(1)).mul_(inverse)
        constant = (log_prior - log_sigma).unsqueeze(1)
        tau = (constant - 0.5 * from_first(z.square())).softmax(0)
        used, mass = Moments(mean, var), torch.zeros_like(mean)
        share, usable = None, None
        if self.batch:
            mass = tau.sum(1)
            share, usable = mass.clamp(min=MASS), mass >= MASS
            mean = (tau * instances.mean).sum(1).div_(share)
            spread = (instances.mean - mean.unsqueeze(1)).square_().add_(instances.var)
            used = Moments(mean, spread.mul_(tau).sum(1).div_(share)).where(usable, used)
        used = Moments(used.mean.detach(), used.var.detach())
        self.found.append((mass, used._replace(mean=used.mean + origin)))
        root = used.var.add(self.eps).rsqrt_()
        scale = gain * root
        total = (tau * scale.unsqueeze(1)).sum(0)
        # Times the sum as rounded: far from zero the two have to cancel.
        offset = bias - (tau * (scale * used.mean).unsqueeze(1)).sum(0)
        found = Map(total, offset.addcmul_(origin, total, value=-1), centre)
        return found, (instances, z, inverse, tau, share, usable, used, root, scale)

    def backward(self, saved: Any, dscale: Tensor, dshift: Tensor) -> GlueGradient:
        """Return the gradients, given ``sum dy * (x - centre)`` and ``sum dy``."""
        instances, z, inverse, tau, share, usable, used, root, scale = saved
        off = instances.mean - used.mean.unsqueeze(1)
        by_map = torch.addcmul(dscale, off, dshift)
        droot = (tau * by_map).sum(1)
        dmean = (tau * dshift).sum(1).mul_(scale).neg_()
        dvar = (scale * root.square()).mul_(droot).mul_(-0.5)
        dtau = by_map.mul_(scale.unsqueeze(1))
        spread = constant = torch.zeros_like(dscale)
        if self.batch:
            by_mean, by_var = (
                torch.where(usable, t, 0).div_(share).unsqueeze(1) for t in (dmean, dvar)
            )
            spread = (tau * by_var).sum(0)
            dtau += by_var * (instances.var - used.var.unsqueeze(1))
            slope = torch.addcmul(by_mean, by_var, off)
            dtau.addcmul_(slope, off)
            constant = slope.addcmul_(by_var, off).mul_(tau).sum(0)
            dmean, dvar = (t.masked_fill(usable, 0) for t in (dmean, dvar))
        dlogit = tau * dtau
        dlogit.addcmul_(tau, dlogit.sum(0), value=-1)
        dprior = dlogit.sum(1)
        dz = dlogit.mul_(z)
        dsigma = (dz * z).sum(1).sub_(dprior)
        dz.mul_(inverse)
        dmu = dz.sum(1)
        spread = spread * (2 / self.positions)
        constant = (constant - dz.sum(0)).div_(self.positions)
        dbias = dshift.sum(0)
        return GlueGradient(
            spread, constant, (dprior, dmu, dsigma, droot.mul_(root), dbias, dmean, dvar)
        )
