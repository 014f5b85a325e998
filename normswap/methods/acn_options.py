"""What users may set of ACN."""

import math
from dataclasses import dataclass

from normswap.errors import ConversionError
from normswap.util.arguments import MOST_CONTEXTS, check_choice, check_count, describe

_CHOICES = {
    "statistics": ("batch", "learned"),
    "assignment": ("channel", "position", "instance"),
    "start": ("skewed", "jitter"),
}
_STRENGTH = {"skewed": math.log(2), "jitter": 0.05}
_STRONGEST = {"skewed": 5.0, "jitter": 0.5}


@dataclass(frozen=True)
class AdaptiveOptions:
    """Options of ACN.

    Attributes:
        components: K, at least 1.
        statistics: what values are normalised with: "batch", the moments of what each component
            owns of the batch, running averages in eval; or "learned", mu and sigma in both modes.
        assignment: what is assigned to components: each value ("channel"), each position by all
            its channels together ("position"), or each channel of an instance by its mean
            ("instance", which costs what CN costs).
        start: what tells the components of a converted norm apart, for equal ones never separate:
            "skewed" lambda, which keeps the function exactly; or "jitter" of mu, which keeps it to
            the fourth order of the strength and needs ``assignment="channel"``.
        strength: of the start. Skewed: log of the ratio between successive lambda, in (0, 5],
            log 2 by default. Jitter: standard deviation of the offsets of mu, in sigmas, in
            (0, 0.5], 0.05 by default.

    Raises:
        ConversionError: a number out of range, or jitter with another assignment.
        UnknownNameError: a name that is none of the choices.
    """

    components: int = 3
    statistics: str = "batch"
    assignment: str = "channel"
    start: str = "skewed"
    strength: float | None = None

    def __post_init__(self) -> None:
        check_count("components", self.components, 1, MOST_CONTEXTS)
        for name, choices in _CHOICES.items():
            check_choice(f"{name}=", getattr(self, name), choices)
        if self.start == "jitter" and self.assignment != "channel":
            raise ConversionError(
                "start='jitter' compensates values that are assigned on their own, got "
                f"assignment={self.assignment!r}; use start='skewed', which is exact for all"
            )
        if self.strength is None:
            object.__setattr__(self, "strength", _STRENGTH[self.start])
        elif not (
            isinstance(self.strength, int | float) and 0 < self.strength <= _STRONGEST[self.start]
        ) or isinstance(self.strength, bool):
            raise ConversionError(
                f"expected strength= in (0, {_STRONGEST[self.start]:g}] for start={self.start!r}, "
                f"got {describe(self.strength)}; components that are equal never separate"
            )
