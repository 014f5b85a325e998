"""CrossNorm: in training, channels exchange their mean and variance."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normswap.functional.backend import is_traced
from normswap.functional.draws import draw_permutation, is_captured
from normswap.functional.schedule import Schedule
from normswap.functional.style import cross_norm, draw_box
from normswap.methods.base import InsertedMethod, register_method
from normswap.methods.layer_tensors import check_input
from normswap.sites import Place
from normswap.util.arguments import check_choice, check_count, check_number

CROPS = ("neither", "style", "content", "both")


class CrossNorm(nn.Module):
    """CrossNorm: an augmentation of features; identity in eval.

    ``y = (x - mu_A) / sigma_A * sigma_B + mu_B`` with ``sigma = sqrt(var + 1e-5)``, var unbiased,
    of each instance and channel A and a randomly drawn B. No parameters and no state.

    Args:
        crop: "neither"; "style": B's statistics come from a random box of it; "content": only a
            random box of A is rewritten, with the box's own statistics; "both", two boxes. One
            draw of boxes serves the batch. "neither" is what most of the authors' scripts use.
        instances: 2, where B is another instance, same channel; 1, where B is another channel of
            the same instance.
        beta: positive; boxes cover a share Beta(beta, beta) of the map before clipping; 1, the
            authors' setting, is uniform.
        p: in [0, 1]; probability that a forward in training is rewritten where the caller does not
            say; 0.5, the authors' usual setting.

    Shape:
        x: (N, C, *), any number of trailing dimensions including none; result: as x.

    Raises:
        UnknownNameError: `crop` is none of the four.
        ConversionError: `instances`, `beta` or `p` out of range.

    Source: Tang et al., ICCV 2021, arXiv 2102.02811, section 3.
    Differs from source: see `normswap.functional.style.cross_norm` and `draw_box`; whether to fire
    is an argument of forward instead of an attribute that other code sets; every draw is torch's.
    """

    # Of a model whose places one schedule fires, a few in a forward.
    schedule: Schedule | None = None
    index: int = 0

    def __init__(
        self, crop: str = "neither", instances: int = 2, beta: float = 1.0, p: float = 0.5
    ) -> None:
        super().__init__()
        CrossNormOptions(crop, instances, beta, p)  # raises where a value is wrong
        self.crop, self.instances, self.beta, self.p = crop, instances, beta, p

    def forward(self, x: Tensor, fire: bool | Tensor | None = None) -> Tensor:
        """Exchange styles, in training and if it fires.

        Args:
            x: input, (N, C, *).
            fire: a bool; a bool tensor, 0-dim, for schedules drawn inside `torch.compile`; or
                None, to ask the model's schedule, or to draw with probability p without one.

        Returns:
            A tensor of the shape, dtype and memory format of x. x itself in eval, where it does
            not fire, and where there is no other instance (or channel) or a single position.

        Raises:
            InputError: fewer than two dimensions, or integers.
        """
        check_input(x, "CrossNorm")
        if not self.training:
            return x
        if fire is None:
            fire = self._draw_fire(x)
        axis = 0 if self.instances == 2 else 1
        if fire is False or x.shape[axis] < 2 or x.shape[2:].numel() < 2:
            return x
        permutation = draw_permutation(x.shape[axis], x.device)
        style_box, content_box = (
            draw_box(x.shape[2:], self.beta, x.device) if self.crop in (part, "both") else None
            for part in ("style", "content")
        )
        condition = fire if isinstance(fire, Tensor) else None
        return cross_norm(x, permutation, self.instances, content_box, style_box, condition)

    def _draw_fire(self, x: Tensor) -> bool | Tensor:
        if self.schedule is not None:
            return self.schedule.fires(self.index, x.device)
        if self.p in (0, 1):
            return bool(self.p)
        if is_traced() or is_captured():
            return torch.rand((), device=x.device) < self.p
        # On the CPU, whatever the device of x, so that the host knows without waiting.
        return torch.rand((), device="cpu").item() < self.p

    def extra_repr(self) -> str:
        """List the settings that are not the default."""
        given, default = vars(self), vars(CrossNormOptions()).items()
        return ", ".join(f"{k}={given[k]!r}" for k, v in default if given.get(k, v) != v)


@dataclass(frozen=True)
class CrossNormOptions:
    """Options of the method "crossnorm"; see `CrossNorm` and `Schedule`.

    Attributes:
        crop: "neither", "style", "content" or "both".
        instances: 2 or 1.
        beta: of the boxes.
        p: probability that a forward in training has firing places.
        active: how many places then fire.

    Raises:
        UnknownNameError: `crop` is none of the four.
        ConversionError: a number out of range.
    """

    crop: str = "neither"
    instances: int = 2
    beta: float = 1.0
    p: float = 0.5
    active: int = 1

    def __post_init__(self) -> None:
        check_choice("crop", self.crop, CROPS)
        check_count("instances", self.instances, 1, 2)
        check_number("beta", self.beta, 0, open_low=True)
        check_number("p", self.p, 0, 1)
        check_count("active", self.active)

    def crossnorm(self) -> CrossNorm:
        """Return a layer with these settings."""
        return CrossNorm(self.crop, self.instances, self.beta, self.p)

    def connect(self, layers: list[nn.Module]) -> Schedule:
        """Return one schedule for all CrossNorm in some layers, told to each."""
        found = [m for layer in layers for m in layer.modules() if isinstance(m, CrossNorm)]
        schedule = Schedule(self.p, self.active, len(found))
        for site, layer in enumerate(found):
            layer.schedule, layer.index = schedule, site
        return schedule


@register_method
class CrossNormMethod(InsertedMethod):
    """CrossNorm at places of a model that one schedule fires."""

    name = "crossnorm"
    title = "exchanges channel statistics between samples in training: an augmentation"
    options = CrossNormOptions
    stochastic = True
    scheduled = True

    def insert(self, place: Place, options: CrossNormOptions) -> nn.Module:
        """Return a layer; it needs no channels."""
        return options.crossnorm()

    def connect(self, layers: list[nn.Module], options: CrossNormOptions) -> Schedule:
        """Share one schedule between the layers."""
        return options.connect(layers)
