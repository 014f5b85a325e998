"""The contexts that samples without a label pool, as one Gaussian."""

import triton
import triton.language as tl


@triton.jit
def pool(
    mean, var, weight, bias, priors, low, high, c, C, LOG: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Return moments, gain and bias of contexts low to high as one Gaussian; moments in float64.

    With LOG, var holds the logarithm of the standard deviation.
    """
    total = tl.zeros(c.shape, tl.float64)
    one = tl.zeros(c.shape, tl.float64)
    two = tl.zeros(c.shape, tl.float64)
    gain = tl.zeros(c.shape, tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        ok = (k < high)[:, None] & (c < C)[None, :]
        at = k.to(tl.int64)[:, None] * C + c[None, :]
        p = tl.load(priors + k, k < high, 0.0).to(tl.float64)[:, None]
        m = tl.load(mean + at, ok, 0.0).to(tl.float64)
        v = tl.load(var + at, ok, 0.0).to(tl.float64)
        if LOG:
            v = tl.exp(2 * v)
        total += tl.sum(p, 0)
        one += tl.sum(p * m, 0)
        two += tl.sum(p * (v + m * m), 0)
        if weight is not None:
            root = tl.sqrt(p.to(tl.float32))
            gain += tl.sum(root * tl.load(weight + at, ok, 0.0).to(tl.float32), 0)
            shift += tl.sum(root * tl.load(bias + at, ok, 0.0).to(tl.float32), 0)
    mu = one / total
    total32 = total.to(tl.float32)
    return mu, tl.maximum(two / total - mu * mu, 0.0), gain / total32, shift / total32


@triton.jit
def add_priors(priors, low, high, BN: tl.constexpr):
    """Return the sum of the priors of contexts low to high."""
    total = 0.0
    for i in range(low, high, BN):
        k = i + tl.arange(0, BN)
        total += tl.sum(tl.load(priors + k, k < high, 0.0).to(tl.float32), 0)
    return total
