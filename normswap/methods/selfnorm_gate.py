"""SelfNorm's gate: a number for each instance and channel, of its mean and standard deviation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normswap.functional.backend import triton_for
from normswap.functional.glue import GateGlue
from normswap.functional.moments import Moments, context_moments, wide_dtype
from normswap.functional.stat_maps import ExplicitGlue
from normswap.functional.style import Style
from normswap.methods.layer_tensors import Resettable
from normswap.methods.running import RunningStats
from normswap.util.distributed import sum_over

# Under the root of an instance's standard deviation.
STD_EPS = 1e-12


class Gate(RunningStats, Resettable):
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

    stats_frozen = False  # `normswap.freeze` sets it: use the running statistics, leave them
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
        self.momentum: float = 0.1
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
        # In float64, as these are small: a mean far from zero would cancel.
        dtype, wide = style.mean.dtype, wide_dtype(style.mean)
        mean, std = (t.to(wide) for t in style)
        weight, gain, bias = (t.to(wide) for t in tensors or self.parameters_in_order())
        z = weight[:, 0] * mean + weight[:, 1] * std
        if (reduce := self.shares()) is not None:
            z = self._shared(z, reduce, replay) * gain + bias
        else:
            running, batch, kept = self._running(z.shape[0], replay)
            z = F.batch_norm(z, *running, gain, bias, batch, self.momentum, 1e-5)
            if kept:
                for buffer, new in zip(kept, running, strict=True):
                    buffer.copy_(new)
        gate = torch.sigmoid(z.to(dtype))
        return gate if self.scale == 1 else self.scale * gate

    def explicit_glue(self, x: Tensor) -> ExplicitGlue:
        """Return what `forward` computes, of x, as glue with its derivative written out."""
        rest = (self.scale, STD_EPS, self.momentum)
        tensors = (*self.parameters_in_order(), self.running_mean, self.running_var)
        triton = triton_for(x, "gate", *tensors)
        if triton is None:
            return GateGlue(x.shape[2:].numel(), *self._running(x.shape[0], False), *rest)
        batch = self._uses_batch(x.shape[0])
        glue: ExplicitGlue = triton.GateGlue(
            x, tensors[3:], batch, batch and not self.keeps_stats(), *rest
        )
        return glue

    def shares(self) -> Callable[[Tensor], Tensor] | None:
        """Return the sum over processes that the batch statistics take, None where they do not."""
        if not (self.synced and self.training) or self.stats_frozen:
            return None
        return sum_over(self.process_group)

    def _uses_batch(self, instances: int) -> bool:
        # Under torch.compile a comparison is no bool.
        if self.training and not self.stats_frozen and instances > 1:
            return True
        return False

    def _running(
        self, instances: int, replay: bool
    ) -> tuple[tuple[Tensor, Tensor], bool, tuple[Tensor, ...]]:
        """Return copies of the running statistics, whether the batch's are used, what to update."""
        batch = self._uses_batch(instances)
        kept = (self.running_mean, self.running_var)
        # Copies, too, because backward needs the values of this forward.
        wide = wide_dtype(self.running_mean)
        running = (kept[0].to(wide, copy=True), kept[1].to(wide, copy=True))
        return running, batch, () if replay or not batch or self.keeps_stats() else kept

    def _shared(self, z: Tensor, reduce: Callable[[Tensor], Tensor], replay: bool) -> Tensor:
        """Normalise z over the instances of all processes, and update the running statistics."""
        running = Moments(self.running_mean.clone()[None], self.running_var.clone()[None])
        everyone = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        count, batch = context_moments(Moments(z, torch.zeros_like(z)), everyone, 1, reduce=reduce)
        used = batch.where(count > 1, running)
        if not (replay or self.keeps_stats()):
            with torch.no_grad():
                unbiased = batch.var[0] * (count / (count - 1).clamp(min=1))
                self.move_running(batch.mean[0], unbiased, self.momentum * (count > 1).to(z.dtype))
        return (z - used.mean) * torch.rsqrt(used.var + 1e-5)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Stay as it is where a state dict, of the model before conversion, knows no gate.

        One without values (meta device) is a fresh one then, which assigning makes it.
        """
        own = self.state_dict()
        if not any(prefix + name in state_dict for name in own):
            if self.weight.is_meta:  # on the default device: no entry says which
                device = torch.get_default_device()
                own = Gate(len(self.weight), self.init, device, self.weight.dtype).state_dict()
            state_dict.update({prefix + name: tensor for name, tensor in own.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
