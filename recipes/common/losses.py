"""What a step minimises: cross-entropy, alone or with consistency between versions of the images.

    ce           cross-entropy
    jsd          cross-entropy, and consistency with two CrossNorm passes
    augmix       cross-entropy, and consistency with two AugMix versions of the images
    augmix+jsd   both consistencies

Consistency is the Jensen-Shannon divergence of the predictions. Cross-entropy sees the clean images
alone. The CrossNorm consistency is computed with the probability that CrossNorm fires; the clean
pass then and otherwise runs without CrossNorm.

Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 5; Hendrycks et al., ICLR 2020, arXiv
1912.02781.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap

from . import parallel
from .data import Batch

# Each loss, and what it leaves for a model without CrossNorm trained beside.
WITHOUT_CROSSNORM = {"ce": "ce", "jsd": "ce", "augmix": "augmix", "augmix+jsd": "augmix"}
LOSSES = tuple(WITHOUT_CROSSNORM)
CROSSNORM_WEIGHT, AUGMIX_WEIGHT = 10, 12
Layers = Sequence[normswap.CrossNorm]


def loss_of(model: nn.Module, loss: str) -> str:
    """Give the loss a model of the run trains with: the run's, as far as its layers allow."""
    return loss if crossnorm_layers(model) else WITHOUT_CROSSNORM[loss]


def training_loss(
    loss: str, model: nn.Module, forward: Callable[[Tensor, Tensor | None], Tensor], batch: Batch
) -> Tensor:
    """Compute a loss on a batch; the predictions come with torch's random state as it is."""
    layers = crossnorm_layers(model)
    crosses = loss != WITHOUT_CROSSNORM[loss]
    versions = [batch.images, *(batch.mixed if loss.startswith("augmix") else ())]
    with switched_off(layers) if crosses else nullcontext():
        found = forward(torch.cat(versions), batch.context.repeat(len(versions)))
    clean, *mixed = found.chunk(len(versions))
    total = F.cross_entropy(clean, batch.labels)
    if mixed:
        total = total + AUGMIX_WEIGHT * jsd([clean, *mixed])
    fires = crosses and torch.rand((), device="cpu").item() < _holders(layers)[0].p
    # Parts of a batch that differ in size may leave processes with different random states.
    if crosses and parallel.from_first(fires):
        with firing(layers):
            crossed = [forward(batch.images, batch.context) for _ in range(2)]
        total = total + CROSSNORM_WEIGHT * jsd([clean, *crossed])
    return total


def jsd(logits: Sequence[Tensor]) -> Tensor:
    """Compute the Jensen-Shannon divergence of predictions, a mean over the samples.

    ``mean_i KL(p_i || M)`` with ``M = clamp(mean_i p_i, 1e-7, 1)``: the value of
    `timm.loss.JsdCrossEntropy`, whose gradient is NaN once a probability underflows to 0.
    """
    # At least float32: under autocast logits can be bfloat16.
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    log_p = torch.stack([F.log_softmax(one, dim=1, dtype=dtype) for one in logits])
    p = log_p.exp()
    log_mixture = p.mean(0).clamp(1e-7, 1).log()
    return (p * (log_p - log_mixture)).sum(2).mean()


def crossnorm_layers(model: nn.Module) -> list[normswap.CrossNorm]:
    """List the CrossNorm layers of a model, those inside CNSN included."""
    return [module for module in model.modules() if isinstance(module, normswap.CrossNorm)]


@contextmanager
def switched_off(layers: Layers) -> Iterator[None]:
    """Make CrossNorm an identity; every other layer stays in its mode."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.train, layer.training)
            layer.eval()
        yield


@contextmanager
def firing(layers: Layers) -> Iterator[None]:
    """Make CrossNorm fire in every forward, at as many places as its schedule has active."""
    with ExitStack() as stack:
        for holder in _holders(layers):
            stack.callback(setattr, holder, "p", holder.p)
            holder.p = 1.0
        yield


def _holders(layers: Layers) -> list[normswap.Schedule | normswap.CrossNorm]:
    """List what holds the firing probability: the schedule the layers share, else each layer."""
    return list(dict.fromkeys(getattr(layer, "schedule", None) or layer for layer in layers))
