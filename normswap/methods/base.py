"""The protocol of a method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from normswap.errors import ConversionError
from normswap.functional.moments import Moments
from normswap.methods.norm_values import PlainNorm
from normswap.methods.norm_values import affine_tensors as affine_tensors
from normswap.methods.registry import get_method as get_method
from normswap.methods.registry import methods as methods
from normswap.methods.registry import register_method as register_method
from normswap.sites import Place, Site


@dataclass(frozen=True)
class Contexts:
    """The contexts of a conversion.

    Attributes:
        names: one a context; its length is K.
        priors: lambda, (K,) float64, positive, sums to one.
        unknown: policy for samples without a label: "error", "pooled", "posterior" or an index.
        answering: how many contexts, the first ones, these samples are answered by; None for all.
    """

    names: tuple[str, ...]
    priors: Tensor
    unknown: str | int = "pooled"
    answering: int | None = None

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
        options: frozen dataclass of what users may set, with defaults.
        needs_context: whether its layers' forward takes ``context``; they are then of a subclass
            of `normswap.methods.layer.ContextLayer`.
        unknown: policy for samples without a label, unless the user names one.
        keeps_function: whether the converted model computes in eval mode what the original did,
            for every context, until it is trained. Without, a conversion says how far they differ
            in place of an error.
        input_dependent: whether what a trained layer computes in eval mode depends on statistics
            of its input, so that no plain norm equals it.
        stochastic: whether a forward in training draws random numbers, of torch.
        scheduled: whether one schedule, which `InsertedMethod.connect` returns, steers the layers
            of a model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[type] = NoOptions
    needs_context: ClassVar[bool] = True
    unknown: ClassVar[str] = "pooled"
    keeps_function: ClassVar[bool] = True
    input_dependent: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False


class Method(BaseMethod):
    """How one method replaces a normalisation layer.

    Subclass, set the class attributes, implement `build`, and decorate with `register_method`.
    Nothing else needs to know the method; `normswap.testing.check_method` tells whether it does
    what the package relies on.
    """

    def refuse(self, site: Site) -> str | None:
        """Return why this method cannot replace the layer at a site, None where it can."""
        return None

    @abstractmethod
    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        """Return a new layer for the place of `source`, with what it starts from.

        With `keeps_function` it computes what `source` computes in eval mode, for every context.
        Mode, hooks, ``requires_grad``, fused children (timm's ``BatchNormAct2d``), the names of the
        contexts and further attributes of `source` are carried over to it afterwards, whatever its
        class.

        Args:
            site: what was read of the norm.
            source: the norm.
            contexts: of the conversion.
            options: of the method, as the user set them.
        """

    def advise(self, norms: list[nn.Module], options: Any) -> str | None:
        """Return what to warn of when these norms of a model are replaced, None for nothing."""
        return None

    def statistics(self, layer: nn.Module) -> Moments | None:
        """Return the mean and variance of each context, (K, C), None where there are none."""
        return None

    def weights(self, layer: nn.Module) -> Tensor | None:
        """Return the weight of each context, (K, C), None where the given priors hold."""
        return None

    def plain(self, layer: nn.Module, context: int | None) -> PlainNorm:
        """Return the plain norm that computes what a layer computes in eval mode.

        By default what the layer's own ``plain(context)`` returns.

        Args:
            layer: one this method built.
            context: index of the context; None for the pooled one, or without contexts.

        Raises:
            ConversionError: no plain norm does; the message says why.
        """
        plain: PlainNorm = self._ask(layer, "plain", "equals no plain norm")(context)
        return plain

    def added_rows(self, layer: nn.Module, like: int | None, share: float) -> dict[str, Tensor]:
        """Return the row of one more context for each tensor (K, *) of a layer, by name.

        With them appended, the new context, the last, computes in eval mode what `like` does; the
        others compute what they did. `remove_context` takes a row out of the tensors named here.
        By default what the layer's own ``added_rows`` returns.

        Args:
            layer: one this method built.
            like: index of the context it starts from; None for the pooled one.
            share: prior probability of the new context, in (0, 1).

        Raises:
            ConversionError: the layer has no contexts to add to.
        """
        ask = self._ask(layer, "added_rows", "takes no further context")
        rows: dict[str, Tensor] = ask(like, share)
        return rows

    def set_moments(self, layer: nn.Module, context: int, moments: Moments) -> None:
        """Give a context other statistics, (C,) each; by default the layer's own method does.

        Raises:
            ConversionError: the layer has no statistics of contexts.
        """
        self._ask(layer, "set_moments", "has no statistics of a context to set")(context, moments)

    def _ask(self, layer: nn.Module, name: str, otherwise: str) -> Any:
        if not hasattr(layer, name):
            kind = type(layer).__name__
            raise ConversionError(
                f"method {self.name!r}: its layer {kind} {otherwise} (it has no {name}())"
            )
        return getattr(layer, name)


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

    def effect(self, layer: nn.Module) -> str | None:
        """Return what a layer does in eval mode that dropping it would lose, None for nothing.

        By default None for a layer without parameters and buffers, which can have learned nothing.
        """
        if not layer.state_dict():
            return None
        return f"method {self.name!r} does not say whether its layer is the identity"
