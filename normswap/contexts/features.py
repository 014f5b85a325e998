"""What clusters are made of: the pixels of images, or what a model or a function makes of them."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.errors import ContextError
from normswap.util.batches import undisturbed

PIXELS = "pixels"
# Images up to this side are taken pixel by pixel, larger ones averaged down to it: neighbouring
# pixels say the same, and 150,000 dimensions of a 224 px image would only slow the clusters down.
SIDE = 32
Features = str | nn.Module | Callable[[Any], Tensor]


class Extractor:
    """Makes features (N, D) float32 of a batch.

    Args:
        features: "pixels", a model or a function.
        saved: what `describe` returned when the clusters were made; None when they are being made.

    Raises:
        ContextError: none of these, or another model than before.
    """

    def __init__(self, features: Features, saved: dict[str, Any] | None = None) -> None:
        if not (features == PIXELS or callable(features)):
            raise ContextError(
                f'expected features= as "pixels", a model or a function, got {features!r}'
            )
        self.features = features
        self.size: list[int] | None = None if saved is None else saved["size"]
        self.identity = identify(features)
        self._versions = self._version()
        if saved is not None and self.identity != saved["identity"]:
            raise ContextError(
                f"expected features= {saved['identity']}, on which these clusters were made, got "
                f"{self.identity}"
            )

    def describe(self) -> dict[str, Any]:
        """Return what a later extractor must agree with, as JSON values."""
        return {"identity": self.identity, "size": self.size}

    def __call__(self, batch: Any) -> Tensor:
        """Return the features of a batch, on the device they come on.

        Raises:
            ContextError: no input or no features of the expected shape, or a model whose weights
                are not what they were.
        """
        if self.features == PIXELS:
            result = self._pixels(first_of(batch))
        elif isinstance(self.features, nn.Module):
            result = self._of_model(self.features, batch)
        else:
            assert callable(self.features)
            with torch.no_grad():
                result = self.features(first_of(batch))
        if not isinstance(result, Tensor) or result.dim() != 2 or not result.shape[1]:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ContextError(
                f"expected features (N, D) of a batch, got {got}; average what has positions, or "
                "give a function that does"
            )
        if self.features != PIXELS:
            self._check_size([result.shape[1]])
        return result.detach().to(torch.float32)

    def _check_size(self, size: list[int]) -> None:
        if self.size is None:
            self.size = size
        if self.size != size:
            raise ContextError(f"expected features of size {self.size}, as at first, got {size}")

    def _pixels(self, x: Tensor) -> Tensor:
        # As everywhere in torch, integers run from 0 to 255 and floats from 0 to 1.
        x = x.float() if x.is_floating_point() else x.float() / 255
        if x.dim() < 2:
            raise ContextError(f"expected a batch (N, C, H, W) or (N, ...), got {tuple(x.shape)}")
        if x.dim() != 4:
            self._check_size(list(x.shape[1:]))
            return x.flatten(1)
        height, width = (min(side, SIDE) for side in x.shape[2:])
        if self.size is not None and len(self.size) == 3:
            height, width = self.size[1:]
        self._check_size([x.shape[1], height, width])
        return F.adaptive_avg_pool2d(x, (height, width)).flatten(1)

    def _of_model(self, model: nn.Module, batch: Any) -> Tensor:
        if self._version() != self._versions:
            if identify(model) != self.identity:
                raise ContextError(
                    f"the {type(model).__name__} these clusters were made on has changed since; "
                    "give features=copy.deepcopy(model) to train it meanwhile"
                )
            self._versions = self._version()
        x = first_of(batch)
        like = next((t for t in (*model.parameters(), *model.buffers())), x)
        both = x.is_floating_point() and like.is_floating_point()
        x = x.to(like.device, like.dtype if both else x.dtype)
        inner: Any = model
        with undisturbed(model), torch.no_grad():
            y: Tensor = getattr(inner, "forward_features", inner)(x)
            if hasattr(model, "forward_features") and hasattr(model, "forward_head"):
                y = inner.forward_head(y, pre_logits=True)
        return y

    def _version(self) -> tuple[int, ...]:
        """Return numbers that move when a tensor of the model is written to."""
        if not isinstance(self.features, nn.Module):
            return ()
        tensors = [*self.features.parameters(), *self.features.buffers()]
        # Tensors of inference mode count no writes, and can hardly be written to.
        return tuple(n for t in tensors for n in (id(t), 0 if t.is_inference() else t._version))


def first_of(batch: Any) -> Tensor:
    """Return the input in a batch: a real tensor, or the first item of a tuple or list."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor) or x.is_complex():
        kind = x.dtype if isinstance(x, Tensor) else type(batch).__name__
        raise ContextError(
            "expected a batch that is a real tensor, or a tuple or list whose first item is one, "
            f"got {kind}; convert it in a collate function"
        )
    return x


def targets_of(batch: Any) -> Tensor | None:
    """Return the classes of a batch (input, classes, ...), integers (N,); None if it has none."""
    if not (isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor)):
        return None
    second = batch[1]
    whole = not (second.is_floating_point() or second.is_complex() or second.dtype == torch.bool)
    return second if second.dim() == 1 and whole else None


def identify(features: Features) -> str:
    """Return what tells features apart: a function's name, a model's class and weights."""
    if isinstance(features, str):
        return features
    if not isinstance(features, nn.Module):
        kind = features if hasattr(features, "__qualname__") else type(features)
        return f"function {kind.__module__}.{kind.__qualname__}"
    digest = hashlib.sha256()
    for name, value in sorted(features.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(plain.numpy().data)
    return f"{type(features).__name__} of weights {digest.hexdigest()[:32]}"
