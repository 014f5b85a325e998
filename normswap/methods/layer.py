"""What every context-aware layer shares: its labels, its policy for unknown ones, its tail."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from normswap.arguments import (
    MOST_CONTEXTS,
    MOST_FEATURES,
    check_count,
    describe,
)
from normswap.errors import ContextError, MissingContextError, refuse_scripting
from normswap.functional.labels import Context, Labels, labels_per_row, resolve_labels, wrong_length
from normswap.methods.values import Resettable, make_priors
from normswap.sites import Site
from normswap.util.looks import AsBefore

# What code that reads a norm may ask of it; the answer is that of the norm replaced.
_SETTINGS = ("affine", "track_running_stats")
POLICIES = ("error", "pooled", "posterior")


class Scope(Protocol):
    """What the layers of a converted model share."""

    rows: Any

    def lookup(self) -> Context | None:
        """Return the context in scope, if any."""


class NormLayer(AsBefore, Resettable):
    """Base of layers that replace a norm: where it stood, and what it applies after normalising.

    Args:
        num_features: C, the size of dimension 1 of the input.

    Attributes:
        context_parameters: names of the parameters that have a row for each context or component.
        stats_frozen: whether training mode, too, uses the running statistics and leaves them;
            `normswap.freeze` sets it.
    """

    context_parameters: ClassVar[tuple[str, ...]] = ()
    stats_frozen = False
    affine = True
    track_running_stats = True
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, num_features: int) -> None:
        super().__init__()
        check_count("num_features", num_features, 1, MOST_FEATURES, error=ContextError)
        self.num_features = num_features
        self.site = ""
        self.dims: tuple[int, ...] = ()
        self.tail: tuple[str, ...] = ()

    def reset_running_stats(self) -> None:
        """Set zero mean, unit variance and no batches, where there are running statistics."""
        start = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
        for name, value in start.items():
            buffer = self._buffers.get(name)
            if buffer is not None:
                buffer.fill_(value)

    def _record(self, x: fx.Proxy, **given: Any) -> Any:
        """Become one call in a graph of `torch.fx`: no trace goes through the layer."""
        tracer: Any = x.tracer
        given = {name: value for name, value in given.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), given)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ContextError(
                f"expected input (N, {self.num_features}, *) at {self._where()}, "
                f"got {tuple(x.shape)}; channels are dimension 1"
            )
        if self.dims and x.dim() not in self.dims:
            raise ContextError(
                f"expected input of {' or '.join(map(str, self.dims))} dimensions at "
                f"{self._where()}, got {x.dim()}"
            )

    def _where(self) -> str:
        return self.site or type(self).__name__

    def _finish(self, y: Tensor) -> Tensor:
        """Apply the children the replaced layer applied: drop, act."""
        for name in self.tail:
            y = getattr(self, name)(y)
        return y


class ContextLayer(NormLayer):
    """Base of layers whose forward takes a context.

    A subclass implements ``normalize(x, labels, unlabelled)``. `labels` is one int64 per row of
    x, in [-1, K) with -1 for unknown, or None when the whole batch is unknown and the policy
    decides; `unlabelled` is False where no label is -1.

    Args:
        num_features: C, the size of dimension 1 of the input.
        num_contexts: K.
        unknown: what a sample without a label is normalised with: "error", "pooled", "posterior",
            or the index of a context.
    """

    context_argument = "context"
    priors: Tensor
    kept_priors: Tensor | None = None  # their values, while they are on the meta device

    def __init__(self, num_features: int, num_contexts: int, unknown: str | int = "pooled") -> None:
        super().__init__(num_features)
        check_count("num_contexts", num_contexts, 1, MOST_CONTEXTS, error=ContextError)
        index = isinstance(unknown, int) and not isinstance(unknown, bool)
        known = isinstance(unknown, str) and unknown in POLICIES
        if not known and not (index and 0 <= int(unknown) < num_contexts):
            raise ContextError(
                f"expected unknown= one of {', '.join(POLICIES)} or the index of a context in "
                f"[0, {num_contexts}), got {describe(unknown)}"
            )
        self.num_contexts = num_contexts
        self.unknown = unknown
        self.names = tuple(str(k) for k in range(num_contexts))
        self.scope: Scope | None = None

    def add_priors(
        self, priors: Tensor | None, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        """Register lambda, (K,): uniform by default; float64 only in a float64 layer.

        Raises:
            ContextError: not K positive values that sum to one.
        """
        values = make_priors(priors, self.num_contexts, torch.device("cpu"), dtype)
        self.register_buffer("priors", values.to(device or torch.get_default_device()))
        self.kept_priors = values if self.priors.is_meta else None

    def known_priors(self) -> Tensor:
        """Return lambda, which is a setting: its values are known on the meta device too."""
        kept = self.kept_priors if self.priors.is_meta else None
        return self.priors if kept is None else kept

    def load_priors(self, state: dict[str, Any], prefix: str, like: Tensor | None) -> None:
        """Complete the state dict of a base, which has no lambda, in place.

        Args:
            state: the state dict being loaded.
            prefix: of this layer's keys.
            like: an entry of it, on whose device lambda has to be where entries are assigned.
        """
        if not isinstance(state.get(prefix + "priors"), Tensor):
            known = self.known_priors()
            state[prefix + "priors"] = known if like is None else known.to(like.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = self.priors
        if not before.is_meta:
            self.kept_priors = None
        super()._apply(fn, recurse)
        if self.priors.is_meta and not before.is_meta:
            self.kept_priors = before.detach().cpu()
        return self

    def _fill(self) -> None:
        if self.kept_priors is not None:
            self.priors.copy_(self.kept_priors)
        super()._fill()

    def forward(self, x: Tensor, context: Labels | None = None) -> Tensor:
        """Normalise x with the statistics of each sample's context.

        Args:
            x: input, (N, C, *).
            context: labels (N,) in [0, K), -1 for unknown; names; one name for all; or None.

        Returns:
            A tensor of the shape, dtype and memory format of x.

        Raises:
            ContextError: a shape, length, dtype, device or value that does not fit.
            MissingContextError: no label where the mode or the policy needs one.
        """
        if isinstance(x, fx.Proxy):
            return self._record(x, context=context)
        self._check_input(x)
        labels, unlabelled = self._labels(x, context)
        return self._finish(self.normalize(x, labels, unlabelled))

    @abstractmethod
    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""

    def mixing(self, dtype: torch.dtype) -> Tensor:
        """Return lambda, (K,), summing to one again after what a cast rounded."""
        priors = self.priors.to(dtype)
        return priors / priors.sum()

    def _labels(self, x: Tensor, context: Labels | None) -> tuple[Tensor | None, bool]:
        if context is None and self.scope is not None:
            context = self.scope.lookup()
        if context is None:
            return self._default_labels(x), self.num_contexts > 1
        order: tuple[Any, ...] = ()
        if not isinstance(context, Context):
            # Called directly, not through a model that checked the labels: no folded batch here.
            context = resolve_labels(context, self.num_contexts, self.names, x.device)
            if not context.whole and context.labels.shape[0] != x.shape[0]:
                raise wrong_length(x.shape[0], context.labels.shape[0], self._where())
        elif self.scope is not None:
            step = self.scope.rows.find(self, self._where(), x, context)
            order = () if step is None else (step.how, step.index)
        if self.unknown == "error" and context.unknown is not False:
            self._refuse_unknown(context)
        where = self._where()
        labels = labels_per_row(context, x, where, *order)
        return labels, context.unknown is not False

    def _default_labels(self, x: Tensor) -> Tensor | None:
        if self.num_contexts == 1:
            return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        if self.training or self.unknown == "error":
            why = "in training mode" if self.training else "with unknown='error'"
            raise MissingContextError(
                f"expected `context`, one label per sample, {why}, got none (at {self._where()}; "
                f"contexts: {', '.join(self.names)}); pass context= to the model or wrap the call "
                "in normswap.use_context(model, labels)"
            )
        return None

    def _refuse_unknown(self, context: Context) -> None:
        if context.unknown:
            raise MissingContextError(
                f"expected a known `context` for every sample with unknown='error', got -1 "
                f"(at {self._where()}); label them or convert with another unknown="
            )
        if not torch.compiler.is_compiling() and type(context.labels) is Tensor:
            torch._assert_async((context.labels >= 0).all(), "unknown='error', got a label -1")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Say what to do about tensors of other sizes."""
        errors = args[-1]
        before = len(errors)
        super()._load_from_state_dict(*args, **kwargs)
        if len(errors) > before:
            errors.append(
                f"{self._where()} is a layer of {self.num_contexts} contexts: normswap.load makes "
                "the model that normswap.save wrote, normswap.add_context adds contexts"
            )

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        text = f"{self.num_features}, num_contexts={self.num_contexts}"
        return text if self.unknown == "pooled" else f"{text}, unknown={self.unknown!r}"


def _keep_requires_grad(layer: nn.Module, source: nn.Module, site: Site) -> None:
    """Freeze what replaces a frozen weight or bias, and the whole layer where both are."""
    affine = {name: getattr(source, name, None) for name in ("weight", "bias")}
    given = {name: t.requires_grad for name, t in affine.items() if t is not None}
    if site.frozen or (given and not any(given.values())):
        layer.requires_grad_(False)
        return
    for name, required in given.items():
        layer.get_parameter(name).requires_grad_(required)


def adopt(layer: NormLayer, source: nn.Module, site: Site) -> None:
    """Carry over from the layer being replaced: place, mode, hooks, fused children, freezing."""
    layer.site, layer.dims = site.fqn, site.dims
    _keep_requires_grad(layer, source, site)
    for name in site.fused:
        layer.add_module(name, getattr(source, name))
    layer.tail = site.fused
    layer.training = source.training
    hooks = [n for n in vars(nn.Module()) if "hook" in n and "state_dict" not in n]
    for name in (*hooks, "_state_dict_hooks", "_state_dict_pre_hooks"):
        layer.__dict__[name] = source.__dict__[name]
    known = set(vars(layer)) | set(vars(nn.Module()))
    for name, value in vars(source).items():
        if name in _SETTINGS or (name not in known and not hasattr(type(layer), name)):
            layer.__dict__[name] = value


def load_shared(
    state: dict[str, Any], prefix: str, targets: dict[str, Tensor], scales: dict[str, Tensor]
) -> None:
    """Broadcast entries of a base layer's state dict, (C,) or (), to one row per context.

    Args:
        state: the state dict being loaded, changed in place.
        prefix: of this layer's keys.
        targets: this layer's tensors by key, each (K, *base shape).
        scales: factor per context for some keys, (K, 1).
    """
    for name, target in targets.items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape == target.shape[1:]:
            value = value.unsqueeze(0).expand(target.shape).clone()
            if name in scales:
                value = value * scales[name].to(value)
            state[prefix + name] = value


def fill_affine(state: dict[str, Any], prefix: str, num_features: int) -> None:
    """Complete the state dict of a base norm that has no weight or no bias, in place."""
    mean = state.get(prefix + "running_mean")
    if isinstance(mean, Tensor) and mean.shape == (num_features,):
        state.setdefault(prefix + "weight", torch.ones_like(mean))
        state.setdefault(prefix + "bias", torch.zeros_like(mean))
