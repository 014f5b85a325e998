"""What every context-aware layer shares: its labels, its policy for unknown ones, what follows."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, fx

from normswap.errors import ContextError, refuse_scripting
from normswap.functional.backend import is_eager, may_serve, triton_for
from normswap.functional.label_rows import SharedScope, labels_per_row, wrong_length
from normswap.functional.labels import Context, Labels, resolve_labels
from normswap.methods.layer_tensors import Resettable, WithPriors, check_input, lay_out
from normswap.methods.layer_tensors import load_shared as load_shared
from normswap.methods.running import RUNNING, RunningStats
from normswap.methods.unknown_labels import UnknownLabels, check_unknown
from normswap.util.arguments import MOST_CONTEXTS, MOST_FEATURES, check_count
from normswap.util.original_class import AsBefore


class NormLayer(AsBefore, RunningStats, Resettable):
    """Base of layers that replace a norm: where it stood, and what it applies after normalising.

    Args:
        num_features: C, the size of dimension 1 of the input.

    Attributes:
        context_parameters: names of the parameters that have a row for each context or component.
    """

    context_parameters: tuple[str, ...] = ()
    affine = True
    __prepare_scriptable__ = refuse_scripting

    def __init__(self, num_features: int) -> None:
        super().__init__()
        check_count("num_features", num_features, 1, MOST_FEATURES, error=ContextError)
        self.num_features = num_features
        self.site = ""
        self.dims: tuple[int, ...] = ()
        self.fused: tuple[str, ...] = ()

    def _record(self, x: fx.Proxy, **given: Any) -> Any:
        """Become one call in a graph of `torch.fx`: no trace goes through the layer."""
        tracer: Any = x.tracer
        given = {name: value for name, value in given.items() if value is not None}
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), given)

    def _accept(self, x: Tensor) -> Tensor:
        """Check the input; return it laid out in memory as batch norm would return it."""
        check_input(x, self._where(), self.num_features, ContextError)
        if self.dims and x.dim() not in self.dims:
            raise ContextError(
                f"expected input of {' or '.join(map(str, self.dims))} dimensions at "
                f"{self._where()}, got {x.dim()}"
            )
        return lay_out(x)

    def _where(self) -> str:
        return self.site or type(self).__name__

    def _finish(self, y: Tensor) -> Tensor:
        """Apply the children the replaced layer applied: drop, act."""
        for name in self.fused:
            y = getattr(self, name)(y)
        return y


class ContextLayer(UnknownLabels, WithPriors, NormLayer):
    """Base of layers whose forward takes a context.

    A subclass implements ``normalize(x, labels, unlabelled)``. `labels` is one int64 per row of
    x, in [-1, K) with -1 for unknown, or None when the whole batch is unknown and the policy
    decides; `unlabelled` is False where no label is -1.

    Args:
        num_features: C, the size of dimension 1 of the input.
        num_contexts: K.
        unknown: what a sample without a label is normalised with: "error", "pooled", "posterior",
            or the index of a context.
        priors: lambda, (K,), positive, sums to one; uniform by default. A buffer.
        device: of the priors.
        dtype: of the layer's tensors.
    """

    _normswap_argument = "context"
    kernels = ""  # the module of `normswap.functional.triton`, and what its kernels read:
    read: tuple[str, ...] = ()
    most_weighed = 0

    def __init__(
        self,
        num_features: int,
        num_contexts: int,
        unknown: str | int = "pooled",
        priors: Tensor | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features)
        check_count("num_contexts", num_contexts, 1, MOST_CONTEXTS, error=ContextError)
        check_unknown(unknown, num_contexts)
        self.num_contexts = num_contexts
        self.unknown = unknown
        self.names = tuple(str(k) for k in range(num_contexts))
        self.scope: SharedScope | None = None
        self.add_priors(priors, device, dtype)

    def forward(self, input: Tensor, context: Labels | None = None) -> Tensor:
        """Normalise the input with the statistics of each sample's context.

        Args:
            input: (N, C, *), by the name that torch's norms give it.
            context: labels (N,) in [0, K), -1 for unknown; names; one name for all; or None.

        Returns:
            A tensor of the shape, dtype and memory format of the input.

        Raises:
            ContextError: a shape, length, dtype, device or value that does not fit.
            MissingContextError: no label where the mode or the policy needs one.
        """
        if isinstance(input, fx.Proxy):
            return self._record(input, context=context)
        x = self._accept(input)
        labels, unlabelled = self._labels(x, context)
        return self._finish(self.normalize(x, labels, unlabelled))

    @abstractmethod
    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        """Compute the layer; see the class."""

    def find_triton(self, x: Tensor, unlabelled: bool) -> tuple[Any, list[Any]] | None:
        """Return the module of Triton's kernels for this layer, and the tensors they are to read.

        None where they don't serve: samples without a label weigh more contexts than kernels do,
        or not all, or `triton_for` says so.
        """
        if not may_serve(x):
            return None
        few = self.num_contexts <= self.most_weighed and self.answering is None
        if not is_eager() or (self.weighs(unlabelled) and not few):
            return None
        # A module's own look-up of a tensor takes ten times as long as one in these.
        own, other = self._parameters, self._buffers
        tensors = [
            own[n] if n in own else other[n] if n in other else getattr(self, n) for n in self.read
        ]
        module = triton_for(x, self.kernels, *tensors)
        return None if module is None else (module, tensors)

    def _labels(self, x: Tensor, context: Labels | None) -> tuple[Tensor | None, bool]:
        where = self._where()
        if context is None and self.scope is not None:
            context = self.scope.lookup()
        if context is None:
            return self.labels_of_none(x, where), self.num_contexts > 1
        order: tuple[Any, ...] = ()
        if not isinstance(context, Context):
            # Called directly, not through a model that checked the labels: no folded batch here.
            context = resolve_labels(context, self.num_contexts, self.names, x.device)
            if not context.whole and context.labels.shape[0] != x.shape[0]:
                raise wrong_length(x.shape[0], context.labels.shape[0], where)
        elif self.scope is not None:
            step = self.scope.rows.find(self, where, x, context)
            order = () if step is None else (step.how, step.index)
        self.refuse_unknown(context, where)
        labels = labels_per_row(context, x, where, *order)
        return labels, context.unknown is not False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Note whose rows they are, where torch notes the version."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["contexts"] = self.names

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take a base's entries for every context; refuse rows in another order or number."""
        state_dict, prefix, metadata, errors = *args[:3], args[-1]
        saved = (metadata or {}).get("contexts", ())
        if any(n in self.names and self.names.index(n) != k for k, n in enumerate(saved)):
            errors.append(
                f"expected the contexts of {self._where()} in the order {', '.join(self.names)}, "
                f"got {', '.join(saved)}; convert with contexts={list(saved)!r}"
            )
            return
        targets = {name: getattr(self, name) for name in self.context_parameters}
        load_shared(state_dict, prefix, targets, {})
        like = next((t for n in targets if (t := state_dict.get(prefix + n)) is not None), None)
        if prefix + "priors" not in state_dict:  # a base's
            for name in RUNNING:
                if self._buffers.get(name) is None:
                    state_dict.pop(prefix + name, None)
        self.load_priors(state_dict, prefix, like)
        before = list(errors)
        super()._load_from_state_dict(*args, **kwargs)
        if errors != before:
            errors.append(
                f"{self._where()} is a layer of {self.num_contexts} contexts: normswap.load makes "
                "the model that normswap.save wrote, normswap.add_context adds contexts"
            )

    def extra_repr(self) -> str:
        """List the settings, non-default ones last."""
        text = f"{self.num_features}, num_contexts={self.num_contexts}"
        text += "" if self.unknown == "pooled" else f", unknown={self.unknown!r}"
        return text if self.answering is None else f"{text}, answering={self.answering}"
