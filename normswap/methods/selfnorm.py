"""SelfNorm: each channel recalibrated by a gate on its own mean and standard deviation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.distributed import sum_over
from normswap.errors import ConversionError, InputError, UnknownNameError
from normswap.functional.affine import Affine
from normswap.functional.backward import in_backward
from normswap.functional.fused import stat_affine
from normswap.functional.gate import GateGlue
from normswap.functional.mixture_synced import shared_batch_norm
from normswap.functional.moments import Moments
from normswap.functional.style import Style, style_of
from normswap.methods.base import InsertedMethod, register_method
from normswap.sites import Place

INITS = ("identity", "paper")
# Under the root of an instance's standard deviation.
_EPS = 1e-12


class Gate(nn.Module):
    """One gate: ``scale * sigmoid(BN(w1 * mean + w2 * std))``, for each instance and channel.

    BN is batch normalization over the instances, biased variance plus 1e-5 under the root, running
    statistics with momentum 0.1 (unbiased variance) in eval. It is part of this layer rather than
    a BatchNorm module, so that what rewrites a model's norms does not take it for one of them. A
    training batch of one instance has no spread: it uses the running statistics and leaves them.
    With `synced` set, the instances are those of all processes, or of those in the group that
    `process_group` names.

    Args:
        num_features: C.
        init: see `SelfNorm`.
        device: of parameters and buffers.
        dtype: of parameters and buffers.

    Shape:
        parameters weight: (C, 2), bn_weight, bn_bias: (C,); buffers running_mean, running_var:
        (C,). Result: (N, C).
    """

    stats_frozen = False  # as for the layers that replace norms, see `normswap.freeze`
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        init: str = "identity",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init = init
        self.scale = 2.0 if init == "identity" else 1.0
        self.momentum = 0.1
        self.synced = False
        self.process_group: str | None = None
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_features, 2, **options))
        self.bn_weight = nn.Parameter(torch.empty(num_features, **options))
        self.bn_bias = nn.Parameter(torch.empty(num_features, **options))
        self.register_buffer("running_mean", torch.empty(num_features, **options))
        self.register_buffer("running_var", torch.empty(num_features, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw w as the source does, uniform in +-1/sqrt(2); start BN as `init` says."""
        nn.init.uniform_(self.weight, -math.sqrt(0.5), math.sqrt(0.5))
        nn.init.constant_(self.bn_weight, 0 if self.init == "identity" else 1)
        nn.init.zeros_(self.bn_bias)
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)

    def parameters_in_order(self) -> tuple[Tensor, ...]:
        """Return w, and the affine of BN."""
        return self.weight, self.bn_weight, self.bn_bias

    def forward(
        self, style: Style, tensors: Sequence[Tensor] | None = None, replay: bool = False
    ) -> Tensor:
        """Return the gate of each instance and channel, (N, C).

        Args:
            style: of the instances.
            tensors: used in place of `parameters_in_order`.
            replay: a second forward for a derivative, which updates nothing.
        """
        mean, std = style
        weight, bn_weight, bn_bias = tensors or self.parameters_in_order()
        weight = weight.to(mean.dtype)
        z = (weight[:, 0] * mean + weight[:, 1] * std).to(bn_weight.dtype)
        if (reduce := self.shares()) is not None:
            z = self._shared(z, reduce, replay) * bn_weight + bn_bias
        else:
            running, batch = self._running(z.shape[0], replay)
            z = F.batch_norm(z, *running, bn_weight, bn_bias, batch, self.momentum, 1e-5)
        gate = torch.sigmoid(z.to(mean.dtype))
        return gate if self.scale == 1 else self.scale * gate

    def by_hand(self, positions: int, instances: int) -> GateGlue:
        """Return what `forward` computes as glue with its derivative written out."""
        running, batch = self._running(instances, False)
        return GateGlue(positions, running, batch, self.scale, _EPS, self.momentum)

    def shares(self) -> Callable[[Tensor], Tensor] | None:
        """Return the sum over processes that the batch statistics take, None where they do not."""
        if not (self.synced and self.training) or self.stats_frozen:
            return None
        return sum_over(self.process_group)

    def _running(self, instances: int, replay: bool) -> tuple[tuple[Tensor, Tensor], bool]:
        """Return the running statistics to use, and whether the batch's are used instead."""
        batch = False
        # Under torch.compile a comparison is no bool.
        if self.training and not self.stats_frozen and instances > 1:
            batch = True
        running = (self.running_mean, self.running_var)
        if replay or (self.training and (not batch or in_backward())):
            # A recomputation updates nothing; and without batch statistics, backward needs the
            # values of this forward, which a later one updates in place.
            running = (running[0].clone(), running[1].clone())
        return running, batch

    def _shared(self, z: Tensor, reduce: Callable[[Tensor], Tensor], replay: bool) -> Tensor:
        """Normalise z over the instances of all processes, and update the running statistics."""
        running = Moments(self.running_mean.clone()[None], self.running_var.clone()[None])
        z, batch, count = shared_batch_norm(z, running, 1e-5, reduce)
        if not (replay or in_backward()):
            with torch.no_grad():
                rate = self.momentum * (count > 1).to(z.dtype)
                unbiased = batch.var * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(batch.mean[0].to(z.dtype), rate)
                self.running_var.lerp_(unbiased[0].to(z.dtype), rate)
        return z

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Stay as it is where a state dict, of the model before conversion, knows no gate."""
        own = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        if not any(name in state_dict for name in own):
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


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
        if num_features < 1:
            raise ConversionError(f"expected num_features of at least 1, got {num_features}")
        if gates not in (1, 2):
            raise ConversionError(f"expected gates of 1 or 2, got {gates!r}")
        if init not in INITS:
            raise UnknownNameError(f"unknown init {init!r}; the inits are {', '.join(INITS)}")
        self.num_features = num_features
        self.gates = gates
        self.init = init
        self.g = Gate(num_features, init, device, dtype)
        self.f = Gate(num_features, init, device, dtype) if gates == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        """Recalibrate x.

        Args:
            x: input, (N, C, *).

        Returns:
            A tensor of the shape, dtype and memory format of x; x itself where it is empty.

        Raises:
            InputError: dimension 1 is not num_features.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise InputError(
                f"expected input (N, {self.num_features}, *) at SelfNorm, got {tuple(x.shape)}; "
                "channels are dimension 1"
            )
        if x.numel() == 0 and not self.g.synced:
            return x
        gates = (self.g,) if self.f is None else (self.g, self.f)
        tensors = [t for gate in gates for t in gate.parameters_in_order()]
        positions = x.shape[2:].numel()
        by_hand = self.f is None and self.g.shares() is None
        hand = partial(self.g.by_hand, positions, x.shape[0]) if by_hand else None
        return stat_affine(x, partial(self._glue, positions), *tensors, hand=hand)

    def _glue(self, positions: int, instances: Moments, *tensors: Tensor, replay: bool) -> Affine:
        """Return the map of each instance; see `normswap.functional.fused`."""
        style = style_of(instances, positions, _EPS)
        g = self.g(style, tensors[:3], replay)
        f = g if self.f is None else self.f(style, tensors[3:], replay)
        return Affine(g, style.mean * f)

    def effect(self) -> str | None:
        """Return what the layer does in eval, None while every gate is exactly 1."""
        gates = [gate for gate in (self.g, self.f) if gate is not None]
        learned = (t for gate in gates for t in (gate.bn_weight, gate.bn_bias))
        if all(gate.scale == 2 for gate in gates) and not any(bool(t.any()) for t in learned):
            return None
        return "SelfNorm scales each channel by a gate on its own mean and spread"

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        text = str(self.num_features)
        if self.gates != 1:
            text += f", gates={self.gates}"
        return text if self.init == "identity" else f"{text}, init={self.init!r}"


@dataclass(frozen=True)
class SelfNormOptions:
    """Options of the method "selfnorm"; see `SelfNorm`.

    Attributes:
        gates: 1 or 2.
        init: "identity" or "paper".
    """

    gates: int = 1
    init: str = "identity"

    def build(self, place: Place) -> SelfNorm:
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

    def insert(self, place: Place, options: SelfNormOptions) -> nn.Module:
        """Return a layer of the place's channels."""
        return options.build(place)

    def effect(self, layer: nn.Module) -> str | None:
        """Return what a trained layer does."""
        assert isinstance(layer, SelfNorm)
        return layer.effect()
