"""What models are run on to compare outputs: what the user gives, else what the model tells."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from normswap.errors import ConversionError
from normswap.util.arguments import describe

_MOST_CONTEXTS_A_BATCH = 8


@dataclass(frozen=True)
class Inputs:
    """Arguments of a forward, positional and by name."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> "Inputs":
        """Return a copy for a forward that may change its arguments in place."""
        return self._map(lambda t: t.detach().clone())

    @property
    def device(self) -> torch.device | None:
        """Where the first tensor is."""
        return next((t.device for t in self._tensors()), None)

    @property
    def batch(self) -> int:
        """How many samples there are; 0 where nothing tells."""
        images = self._lists_of_images()
        return len(images[0]) if images else next((len(t) for t in self._tensors() if t.dim()), 0)

    def widen(self, num_contexts: int) -> "Inputs":
        """Repeat the batch so that more contexts fit in one forward."""
        sizes = {len(t) for t in self._tensors() if t.dim()}
        if len(sizes) != 1 or self._lists_of_images():
            return self
        wanted = min(max(num_contexts, 1), _MOST_CONTEXTS_A_BATCH)
        times = -(-wanted // max(sizes.pop(), 1))
        return self._map(lambda t: torch.cat([t] * times) if t.dim() else t)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        return Inputs(*tree_map_only(Tensor, change, (self.args, self.kwargs)))

    def _tensors(self) -> list[Tensor]:
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def _lists_of_images(self) -> list[list[Tensor]]:
        """Return the arguments that are lists of images, as detection models take batches."""
        given = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, list) and v]
        return [v for v in given if all(isinstance(t, Tensor) and t.dim() == 3 for t in v)]


def read_inputs(given: Any) -> Inputs:
    """Return the arguments that a user gave as ``example_inputs=``.

    Raises:
        ConversionError: neither a tensor, nor a tuple or list of arguments, nor a dict of them.
    """
    if isinstance(given, Tensor):
        return Inputs((given,))
    if isinstance(given, tuple | list):
        return Inputs(tuple(given))
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return Inputs(kwargs=dict(given))
    raise ConversionError(
        "expected example_inputs= as a tensor, a tuple of arguments or a dict of keyword "
        f"arguments, got {describe(given)}; an argument of another kind goes in a tuple: "
        "(argument,)"
    )


def guess_inputs(model: nn.Module) -> Iterator[Inputs]:
    """Yield images that may fit a model which states its input size (timm), likeliest first.

    The model's own layers know better than its configuration, which is that of the weights, what
    channels and size it was made for.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    stated = config.get("input_size") if isinstance(config, Mapping) else None
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None or stated is None or len(stated) != 3:
        return
    convolution = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    sizes = (s for m in model.modules() if (s := getattr(m, "img_size", None)))
    built: Any = next(sizes, stated[1:])
    channels = (getattr(convolution, "in_channels", stated[0]), stated[0])
    sides = ((built, built) if isinstance(built, int) else tuple(built), tuple(stated[1:]))
    for shape in dict.fromkeys(product(channels, sides)):  # each once, in order
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, shape[0], *shape[1], generator=generator, device="cpu")
        yield Inputs((images.to(device=parameter.device, dtype=parameter.dtype),))
