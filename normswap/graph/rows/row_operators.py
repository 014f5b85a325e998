"""Operators that give rows in the order of those they were given, and never mix samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# What torch does not call pointwise, and is.
_POINTWISE = {"hardswish", "log_sigmoid_forward", "masked_fill", "copy", "_prelu_kernel"}
# By what an operator does to dimension 0 of its first argument; other tensors hold no samples.
KEEPING = {
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


@dataclass
class Call:
    """An operator that was run.

    Attributes:
        name: without the underscore of one that changes its argument.
        pointwise: whether torch says that values are of those at their own place, broadcast.
        of: arguments by name.
        first: the first of them.
        followed: those, one or more, whose rows are of the samples in order; others hold none.
        out: the first tensor that was made.
    """

    name: str
    pointwise: bool
    of: dict[str, Any]
    first: Any
    followed: list[Tensor]
    out: Tensor

    @property
    def alone(self) -> bool:
        """Whether the first argument is the one that is followed."""
        return len(self.followed) == 1 and self.followed[0] is self.first


def is_without_values(name: str) -> bool:
    """Return whether what an operator makes has no value of what it is given."""
    return name in _EMPTY


def is_pointwise(name: str) -> bool:
    """Return whether an operator is pointwise that torch does not call so."""
    return name in _POINTWISE


def makes_one(name: str) -> bool:
    """Return whether only the first tensor of several is of the samples."""
    return name in _BATCH_NORMS


def keeps_rows(call: Call, samples: int) -> bool:
    """Return whether the rows of what an operator made are of the samples in order."""
    out, x = call.out, call.followed[0]
    if not out.dim() or out.shape[0] % samples:
        return False
    if call.pointwise:
        return all(t.dim() == out.dim() and t.shape[0] == out.shape[0] for t in call.followed)
    if rule := _RULES.get(call.name):
        return rule(call)
    if call.name in _VIEWS:  # values stay in their order, and each sample has as many
        return call.alone
    if not call.alone or out.shape[0] != x.shape[0]:
        return False
    if call.name == "slice" and out.shape == x.shape:
        return True
    if call.name in _BATCH_NORMS:
        return not call.of.get("training", call.of.get("train", False))
    return call.name in KEEPING or (call.name in _ALONG and _is_along_others(call))


def _is_along_others(call: Call) -> bool:
    """Return whether dimension 0 is none of those that an operator works along."""
    given = [v for key in ("dim", "dims", "dim0", "dim1") if (v := call.of.get(key)) is not None]
    along = [d for value in given for d in (value if isinstance(value, Sequence) else [value])]
    dims = call.first.dim() + (call.name == "unsqueeze")
    return bool(along) and all(d % dims != 0 for d in along)


def _is_batched(call: Call) -> bool:
    rows, dims = call.out.shape[0], call.followed[0].dim()
    return all(t.shape[0] == rows and t.dim() == dims for t in call.followed)


def _is_joined(call: Call) -> bool:
    along, rows = call.of.get("dim", 0) % call.out.dim(), call.out.shape[0]
    return along != 0 and all(t.shape[0] == rows for t in call.followed)


def _is_first_factor(call: Call) -> bool:
    first = call.of.get("mat1", call.first)
    return all(t is first for t in call.followed)


def _is_permuted_after(call: Call) -> bool:
    return call.alone and call.of["dims"][0] % call.out.dim() == 0


def _is_expanded_after(call: Call) -> bool:
    x, out = call.followed[0], call.out
    return call.alone and x.dim() == out.dim() and x.shape[0] == out.shape[0]


def _is_looked_up(call: Call) -> bool:
    return len(call.followed) == 1 and call.followed[0] is call.of["indices"]


def _is_normalised_within(call: Call) -> bool:
    return call.alone and len(call.of["normalized_shape"]) < call.out.dim()


def _is_padded_within(call: Call) -> bool:
    return call.alone and len(call.of["pad"]) < 2 * call.out.dim()


def _is_shuffled_within(call: Call) -> bool:
    return call.alone and call.out.dim() > 3


_RULES: dict[str, Callable[[Call], bool]] = {
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
