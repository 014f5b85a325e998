"""Follow samples through the operators of one run: where each keeps them apart, rows are told.

A tensor is *followed* where its rows are those of the N samples in their order, k of each, so that
row j is of sample j // k. An operator on such a tensor either is known to give one again, or ends
what can be said of the run: from there on rows have to be measured.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, torch.nn.Parameter)
_READERS = {
    *(getattr(Tensor, n) for n in ("tolist", "numpy", "__array__", "data_ptr", "__dlpack__")),
    *(getattr(Tensor, n) for n in ("untyped_storage", "storage")),
}

# What torch does not call pointwise, and is.
_POINTWISE = {"hardswish", "log_sigmoid_forward", "masked_fill", "copy", "_prelu_kernel"}
# By what an operator does to dimension 0 of its first argument; other tensors hold no samples.
_KEEP = {
    *("convolution", "clone", "detach", "alias", "_to_copy", "lift_fresh", "native_dropout"),
    *("squeeze", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices"),
    *("max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "native_group_norm"),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "_upsample_nearest_exact2d"),
    *("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d"),
    *("replication_pad2d", "replication_pad3d"),
}
# As those, along dimensions that the arguments name.
_ALONG = {
    *("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "prod"),
    *("all", "any", "argmax", "argmin", "logsumexp", "linalg_vector_norm", "norm", "cumsum"),
    *("_softmax", "_safe_softmax", "_log_softmax", "glu", "sort", "topk", "flip", "roll", "select"),
    *("slice", "split", "split_with_sizes", "unbind", "index_select", "unsqueeze", "transpose"),
}
_BATCH_NORMS = {
    *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update"),
    "_native_batch_norm_legit_no_training",
}
_EMPTY = {
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
    *("new_empty", "new_zeros", "new_ones", "new_full"),
}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}


class SampleFlow(TorchDispatchMode):
    """Watches the operators of a run of a model on N samples.

    Args:
        samples: N, two or more.

    Attributes:
        broken: whether an operator was met after which nothing can be said.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples, self.broken = samples, False
        # By place and shape, since autograd has other objects for the same; storages stay alive,
        # so that no other takes such a place.
        self._followed: dict[Any, Any] = {}
        self._readers = _Readers(self)

    def __enter__(self) -> "SampleFlow":
        self._readers.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._readers.__exit__(*exc)

    def follow(self, x: Tensor) -> Tensor:
        """Follow a tensor (k N, ...) whose rows are known to be in order."""
        if type(x) not in _PLAIN or x.layout != torch.strided:
            self.broken = True
        else:
            self._followed[_place(x)] = x.untyped_storage()
        return x

    def rows_a_sample(self, x: Tensor) -> int | None:
        """Return k where x (k N, ...) has k rows of each sample in order, for certain."""
        if self.broken or not self._is_followed(x):
            return None
        return x.shape[0] // self.samples

    def _is_followed(self, x: object) -> bool:
        plain = isinstance(x, Tensor) and x.layout == torch.strided
        return plain and bool(self._followed) and _place(x) in self._followed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and follow what it makes of samples."""
        kwargs = kwargs or {}
        if self.broken:
            return func(*args, **kwargs)
        # In inference mode an operator that is made of others comes whole.
        if torch.is_inference_mode_enabled() and func.overloadpacket.__name__ not in _KEEP:
            super().__enter__()
            try:
                with torch._C.DisableTorchFunction():  # which would take it for the whole again
                    made = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if made is not NotImplemented:
                return made
        given = tree_leaves((args, kwargs))
        followed = [value for value in given if self._is_followed(value)]
        made = func(*args, **kwargs)
        if followed:
            with torch._C.DisableTorchFunction():
                self._note(func, args, kwargs, followed, made)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, followed: list[Tensor], made: Any) -> None:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in _EMPTY:
            return
        arguments = func._schema.arguments
        of = {**{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}
        outs = [out for out in tree_leaves(made) if isinstance(out, Tensor)]
        fine = func.namespace == "aten" and bool(outs)
        pointwise = torch.Tag.pointwise in func.tags or name in _POINTWISE
        for argument in filter(_is_written, arguments):
            fine &= pointwise and self._is_followed(of.get(argument.name))
        if not fine or not self._keeps(name, pointwise, of, args, followed, outs[0]):
            self.broken = True
            return
        rows = outs[0].shape[0]
        for out in outs[:1] if name in _BATCH_NORMS else outs:
            if out.dim() and out.shape[0] == rows:
                self.follow(out)

    def _keeps(
        self,
        name: str,
        pointwise: bool,
        of: dict[str, Any],
        args: Any,
        followed: list[Tensor],
        out: Any,
    ) -> bool:
        """Return whether an operator gives rows in the order of those it was given."""
        if not out.dim() or out.shape[0] % self.samples:
            return False
        x = followed[0]
        if pointwise:
            return all(t.dim() == out.dim() and t.shape[0] == out.shape[0] for t in followed)
        if rule := _RULES.get(name):
            return rule(of, followed, out)
        first = len(followed) == 1 and x is args[0]
        if name in _VIEWS:  # of as many values in a row, in the same order
            return first
        if not first or out.shape[0] != x.shape[0]:
            return False
        if name == "slice" and out.shape == x.shape:
            return True
        if name in _BATCH_NORMS:
            return not of.get("training", of.get("train", False))
        return name in _KEEP or (name in _ALONG and _leaves_first(of, x.dim(), name))


class _Readers(TorchFunctionMode):
    """Notices what reads values without an operator, past which nothing can be said."""

    def __init__(self, flow: SampleFlow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch's."""
        if func in _READERS and any(map(self._flow._is_followed, args)):
            self._flow.broken = True
        return func(*args, **(kwargs or {}))


def _place(x: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride(), x.dtype


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _leaves_first(of: dict[str, Any], dims: int, name: str) -> bool:
    """Return whether dimension 0 is none of those that an operator works along."""
    given = [of[key] for key in ("dim", "dims", "dim0", "dim1") if of.get(key) is not None]
    along = [d for value in given for d in (value if isinstance(value, Sequence) else [value])]
    dims += name == "unsqueeze"
    return bool(along) and all(d % dims != 0 for d in along)


def _is_batched(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    """Return whether all tensors have samples in dimension 0, or none at all."""
    rows = out.shape[0]
    return all(t.shape[0] == rows and t.dim() == followed[0].dim() for t in followed)


def _is_joined(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    along = of.get("dim", 0) % out.dim()
    return along != 0 and all(t.shape[0] == out.shape[0] for t in followed)


def _is_first_factor(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    """Return whether rows are those of a first factor, with nothing followed in the second."""
    first = of["mat1"] if "mat1" in of else of["self"]
    return all(t is first for t in followed)


def _is_permuted_after(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    return of["dims"][0] % out.dim() == 0


def _is_expanded_after(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    return followed[0].dim() == out.dim() and followed[0].shape[0] == out.shape[0]


def _is_looked_up(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    return len(followed) == 1 and followed[0] is of["indices"]


def _is_normalised_within(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    first = len(followed) == 1 and followed[0] is of["input"]
    return first and len(of["normalized_shape"]) < out.dim()


def _is_padded_within(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    return len(followed) == 1 and len(of["pad"]) < 2 * out.dim()


def _is_shuffled_within(of: dict[str, Any], followed: list[Tensor], out: Tensor) -> bool:
    return out.dim() > 3


Rule = Callable[[dict[str, Any], list[Tensor], Tensor], bool]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "stack"), _is_joined),
    **dict.fromkeys(("mm", "addmm"), _is_first_factor),
    **dict.fromkeys(("bmm", "baddbmm"), _is_batched),
    "_scaled_dot_product_flash_attention_for_cpu": _is_batched,
    "_scaled_dot_product_flash_attention": _is_batched,
    "_scaled_dot_product_efficient_attention": _is_batched,
    "_scaled_dot_product_cudnn_attention": _is_batched,
    "permute": _is_permuted_after,
    "expand": _is_expanded_after,
    "embedding": _is_looked_up,
    "native_layer_norm": _is_normalised_within,
    "constant_pad_nd": _is_padded_within,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _is_shuffled_within),
}
