"""Follow samples through the operators of one run: where each keeps them apart, rows are told.

A tensor is *followed* where its rows are those of the N samples in their order, k of each, so that
row j is of sample j // k. An operator on such a tensor either is known to give one again, or ends
what can be said of the run: from there on rows have to be measured.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normswap.graph.rows.row_operators import (
    KEEPING,
    Call,
    is_pointwise,
    is_without_values,
    keeps_rows,
    makes_one,
)

_PLAIN = (Tensor, torch.nn.Parameter)
# What reads or copies values without an operator.
_READERS = {
    *(Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.__deepcopy__),
    *(Tensor.__reduce_ex__, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage),
}


class SampleFlow:
    """Watches the operators of a run of a model on N samples.

    Args:
        samples: N, two or more.

    Attributes:
        broken: whether an operator was met after which nothing can be said.
    """

    def __init__(self, samples: int) -> None:
        self.samples, self.broken = samples, False
        # By place and shape, since autograd has other objects for the same; storages stay alive,
        # so that no other takes such a place.
        self._followed: dict[Any, Any] = {}
        self._modes = ExitStack()

    def __enter__(self) -> "SampleFlow":
        self._modes.enter_context(_Readers(self))
        operators = _Operators()  # type: ignore[no-untyped-call]
        operators.flow = self
        self._modes.enter_context(operators)
        return self

    def __exit__(self, *exc: object) -> None:
        self._modes.close()

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

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and follow what it makes of samples."""
        try:
            followed = list(filter(self._is_followed, tree_leaves((args, kwargs))))
        except Exception:  # a tensor of a kind that has no place
            self.broken, followed = True, []
        made = func(*args, **kwargs)
        if followed:
            with torch._C.DisableTorchFunction():
                self._note(func, args, kwargs, followed, made)
        return made

    def _note(self, func: Any, args: Any, kwargs: Any, followed: list[Tensor], made: Any) -> None:
        name = func.overloadpacket.__name__.removesuffix("_")
        if is_without_values(name):
            return
        arguments = func._schema.arguments
        of = {**{a.name: value for a, value in zip(arguments, args, strict=False)}, **kwargs}
        outs = [out for out in tree_leaves(made) if isinstance(out, Tensor)]
        pointwise = torch.Tag.pointwise in func.tags or is_pointwise(name)
        fine = func.namespace == "aten" and bool(outs)
        for argument in filter(_is_written, arguments):
            fine &= pointwise and self._is_followed(of.get(argument.name))
        first = of.get(arguments[0].name) if arguments else None
        call = Call(name, pointwise, of, first, followed, outs[0]) if fine else None
        if call is None or not keeps_rows(call, self.samples):
            self.broken = True
            return
        for out in outs[:1] if makes_one(name) else outs:
            if out.dim() and out.shape[0] == outs[0].shape[0]:
                self.follow(out)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has operators run by a flow, as long as it can say anything."""

    flow: SampleFlow

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator."""
        kwargs = kwargs or {}
        if self.flow.broken:
            return func(*args, **kwargs)
        # In inference mode an operator that is made of others comes whole.
        if torch.is_inference_mode_enabled() and func.overloadpacket.__name__ not in KEEPING:
            with self, torch._C.DisableTorchFunction():  # which would take it for the whole again
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        return self.flow.run(func, args, kwargs)


class _Readers(TorchFunctionMode):
    """Notices readers of a followed tensor, past which nothing can be said."""

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
