"""The protocol of a method, and the registry of methods by name."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from normswap.errors import ConversionError, UnknownNameError
from normswap.functional.moments import Moments
from normswap.sites import Place, Site


@dataclass(frozen=True)
class Contexts:
    """The contexts of a conversion.

    Attributes:
        names: one a context; its length is K.
        priors: lambda, (K,) float64, positive, sums to one.
        unknown: policy for samples without a label: "error", "pooled", "posterior" or an index.
    """

    names: tuple[str, ...]
    priors: Tensor
    unknown: str | int = "pooled"

    @property
    def count(self) -> int:
        """K."""
        return len(self.names)


@dataclass(frozen=True)
class NoOptions:
    """Options of a method that has none."""


class BaseMethod(ABC):
    """What every method states of itself.

    Attributes:
        name: what users call it by.
        title: one line on what it is for.
        needs_context: whether its layers' forward takes ``context``.
        options: frozen dataclass of what users may set, with defaults.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_context: ClassVar[bool] = True
    options: ClassVar[type] = NoOptions


class Method(BaseMethod):
    """How one method replaces a normalisation layer.

    Subclass, set the class attributes, implement `build` and `statistics`, and decorate with
    `register_method`. Nothing else needs to know the method.
    """

    def refuse(self, site: Site) -> str | None:
        """Return why this method cannot replace the layer at a site, None where it can."""
        return None

    @abstractmethod
    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Return a layer that computes what `source` computes in eval mode, for every context.

        The result takes ``forward(x, context=None)`` where `needs_context`, sits on the device
        and in the dtype of `source`, and keeps its ``requires_grad``.
        """

    @abstractmethod
    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the mean and variance of each context, (K, C), None where there are none."""

    def weights(self, layer: nn.Module) -> Tensor | None:
        """Return the weight of each context, (K, C), None where the given priors hold."""
        return None


class InsertedMethod(BaseMethod):
    """How one method joins a model's norms: a layer at a placement, the norms stay.

    Attributes:
        placement: where, unless the user says: a placement of residual blocks, which falls back
            to "norm" in a model without any.
    """

    needs_context: ClassVar[bool] = False
    placement: ClassVar[str] = "post"

    @abstractmethod
    def insert(self, place: Place, options: Any) -> nn.Module:
        """Return a layer for a place that is the identity in eval mode, ``forward(x)``.

        Raises:
            ConversionError: the place does not tell what the layer needs to know.
        """

    def placements(self, placement: str, options: Any) -> tuple[str, ...]:
        """Return every placement the method uses when asked for one."""
        return (placement,)

    def connect(self, layers: list[nn.Module], options: Any) -> Any:
        """Return what steers the layers, begun and ended with each forward of the model, or None.

        It has ``begin(device)`` and ``end()``.
        """
        return None


_REGISTRY: dict[str, BaseMethod] = {}
M = TypeVar("M", bound=type[BaseMethod])


def register_method(cls: M) -> M:
    """Add a method to the registry, as a class decorator.

    Raises:
        ConversionError: the name is taken by another class, or `options` is not a dataclass.
    """
    taken = _REGISTRY.get(cls.name)
    if taken is not None and type(taken).__qualname__ != cls.__qualname__:
        raise ConversionError(f"a method {cls.name!r} is registered already: {type(taken)}")
    if not is_dataclass(cls.options):
        raise ConversionError(
            f"expected the options of method {cls.name!r} as a dataclass, got {cls.options!r}"
        )
    _REGISTRY[cls.name] = cls()
    return cls


def methods() -> list[str]:
    """Return the names of the registered methods."""
    return sorted(_REGISTRY)


def get_method(name: str) -> BaseMethod:
    """Return a method by name.

    Raises:
        UnknownNameError: no such method; the message lists the names.
    """
    if name not in _REGISTRY:
        raise UnknownNameError(f"unknown method {name!r}; the methods are {', '.join(methods())}")
    return _REGISTRY[name]


def parse_options(method: BaseMethod, given: dict[str, Any]) -> Any:
    """Build a method's options from keyword arguments.

    Raises:
        ConversionError: an option the method does not have; the message lists those it has.
    """
    known = [f.name for f in fields(method.options)]
    extra = sorted(set(given) - set(known))
    if extra:
        choices = ", ".join(known) if known else "none"
        raise ConversionError(
            f"unknown option {', '.join(extra)} for method {method.name!r}; its options: {choices}"
        )
    return method.options(**given)


def affine_tensors(source: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a layer, ones and zeros where it lacks them."""
    weight, bias = getattr(source, "weight", None), getattr(source, "bias", None)
    ones = torch.ones(site.num_features, device=site.device, dtype=site.dtype)
    return (
        ones if weight is None else weight.detach(),
        torch.zeros_like(ones) if bias is None else bias.detach(),
    )
