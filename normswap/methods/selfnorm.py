"""SelfNorm: each channel recalibrated by a gate on its own mean and standard deviation."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.functional.affine import Affine
from normswap.functional.moments import Moments
from normswap.functional.stat_maps import stat_affine
from normswap.functional.style import style_of
from normswap.methods.base import InsertedMethod, register_method
from normswap.methods.layer_tensors import check_input
from normswap.methods.selfnorm_gate import STD_EPS, Gate
from normswap.sites import Place
from normswap.util.arguments import MOST_FEATURES, check_choice, check_count

INITS = ("identity", "paper")


class SelfNorm(nn.Module):
    """SelfNorm: style recalibration.

    One gate: ``y = x * g``. Two: ``y = x * g + mu * (f - g)``, which is sigma' = g * sigma and
    mu' = f * mu. Each gate is ``scale * sigmoid(BN(w1 * mu + w2 * sigma))``, w for each channel,
    with sigma = sqrt(var + 1e-12), var unbiased, of each instance and channel; see `Gate`.

    Args:
        num_features: C, at least 1.
        gates: 1, as the authors train, or 2.
        init: "identity": scale 2 and BN weight and bias zero, so that each gate is exactly 1 and
            y is x, in training and eval, until trained. "paper": scale 1, BN weight 1; gates start
            near 0.5, which is for training from scratch: it destroys a pretrained model.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        x: (N, C, *), any number of trailing dimensions including none; result: as x.

    Raises:
        ConversionError: `num_features` or `gates` out of range.
        UnknownNameError: `init` is neither of the two.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 4.
    Differs from source: the identity start; a training batch of one works; maps of one position
    have std 0 (NaN in the source); any number of spatial dimensions; statistics accumulate in
    float32.
    """

    def __init__(
        self,
        num_features: int,
        gates: int = 1,
        init: str = "identity",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_features", num_features, 1, MOST_FEATURES)
        SelfNormOptions(gates, init)  # raises where a value is wrong
        self.num_features, self.gates, self.init = num_features, gates, init
        self.g = Gate(num_features, init, device, dtype)
        self.f = Gate(num_features, init, device, dtype) if gates == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Recalibrate x.

        Args:
            x: input, (N, C, *).

        Returns:
            A tensor of the shape, dtype and memory format of x; x itself where it is empty.

        Raises:
            InputError: dimension 1 is not num_features, or integers.
        """
        check_input(x, "SelfNorm", self.num_features)
        if x.numel() == 0 and not self.g.synced:
            return x
        gates = (self.g,) if self.f is None else (self.g, self.f)
        tensors = [t for gate in gates for t in gate.parameters_in_order()]
        positions = x.shape[2:].numel()
        written_out = self.f is None and self.g.shares() is None
        explicit = partial(self.g.explicit_glue, x) if written_out else None

        def glue(instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
            style = style_of(instances, positions, STD_EPS)
            g = self.g(style, tensors[:3], replay)
            f = g if self.f is None else self.f(style, tensors[3:], replay)
            return Affine(g, style.mean * f)

        return stat_affine(x, glue, *tensors, explicit=explicit)

    def effect(self) -> str | None:
        """Return what the layer does in eval, None while every gate is exactly 1."""
        gates = [gate for gate in (self.g, self.f) if gate is not None]
        learned = (t for gate in gates for t in (gate.bn_weight, gate.bn_bias))
        if all(gate.scale == 2 for gate in gates) and not any(bool(t.any()) for t in learned):
            return None
        return "SelfNorm scales each channel by a gate on its own mean and spread"

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        gates = "" if self.gates == 1 else f", gates={self.gates}"
        init = "" if self.init == "identity" else f", init={self.init!r}"
        return f"{self.num_features}{gates}{init}"


@dataclass(frozen=True)
class SelfNormOptions:
    """Options of the method "selfnorm", by the names of the arguments of `SelfNorm`."""

    gates: int = 1
    init: str = "identity"

    def __post_init__(self) -> None:
        check_count("gates", self.gates, 1, 2)
        check_choice("init", self.init, INITS)

    def selfnorm(self, place: Place) -> SelfNorm:
        """Return a layer for a place.

        Raises:
            ConversionError: nothing around the place tells its channels.
        """
        if place.channels is None:
            raise ConversionError(
                f"cannot tell the number of channels at {place.fqn or 'the input'} "
                f"({place.placement}): no layer around it says; leave it out with exclude="
            )
        return SelfNorm(place.channels, self.gates, self.init, place.device, place.dtype)


@register_method
class SelfNormMethod(InsertedMethod):
    """SelfNorm at places of a model."""

    name = "selfnorm"
    title = "recalibrates each channel by its own statistics, starting as the identity"
    options = SelfNormOptions
    input_dependent = True

    def insert(self, place: Place, options: SelfNormOptions) -> nn.Module:
        """Return a layer of the place's channels."""
        return options.selfnorm(place)

    def effect(self, layer: nn.Module) -> str | None:
        """Return what a trained layer does."""
        assert isinstance(layer, SelfNorm)
        return layer.effect()
