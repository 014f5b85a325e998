"""How a kernel is started: by Triton once for each kind of arguments, then without asking again.

Triton looks at every argument of every launch to find the program that was compiled for its kind.
Without that a training step of a CN layer, eight launches, took .74 ms of host time more than batch
norm's in place of .85, on a machine with an H100.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_TENSORS = {Tensor, nn.Parameter}
# By kernel, device and kinds of arguments. Some programs serve a shape each: the oldest make room.
_COMPILED: dict[tuple[Any, ...], Any] = {}
_MOST = 8192
# Versions of Triton whose programs take what is handed to them below; others are asked each time.
_OLDEST, _NEWEST = (3, 5), (3, 9)
# One rounding for a product and a sum. Triton 3.9 warns where it is left open, 3.10 changes it.
OPTIONS = {"enable_fp_fusion": True}


class BoundLaunch:
    """A launch of which all is given but the tensors, and those are of one kind each time.

    So Triton, and `launch`, look at the first alone; then addresses are handed on. The caller
    answers for the kinds, by `launches_for`, and for which are None.

    Args:
        kernel, programs, meta: as for `launch`.
        numbers: what its parameters after the tensors take.
    """

    __slots__ = ("_found", "_kernel", "_meta", "_numbers", "_programs", "_rest")

    def __init__(self, kernel: Any, programs: int, numbers: tuple[Any, ...], **meta: Any) -> None:
        self._kernel, self._programs, self._numbers, self._meta = kernel, programs, numbers, meta
        self._found: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start the kernel."""
        found = self._found
        if found is None or (found[0] is not None and found[0] != torch._C._cuda_getDevice()):
            found = launch(self._kernel, self._programs, *tensors, self._numbers, **self._meta)
            if found is not None:
                # In this order: another thread takes the rest where it finds the program.
                self._rest = *self._numbers, *found[4]
                self._found = found
            return
        index, run, function, metadata, *_ = found
        stream = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
        ptrs = [None if t is None else t.data_ptr() for t in tensors]
        # As in `launch`.
        run(self._programs, 1, 1, stream, function, metadata, None, None, None, *ptrs, *self._rest)


def launches_for(tensors: Sequence[Tensor], find: Callable[..., T], *what: Any) -> T:
    """Return ``find(kinds, *what)``, which keeps what it found: instances of `BoundLaunch`.

    Kinds are what a compiled program depends on of tensors, on one device: their dtypes, and which
    do not begin at a multiple of 16 bytes, as slices may.

    Args:
        tensors: all that the launches are given and that may be of another kind in another call.
        find: decorated with `functools.lru_cache`.
        what: else decides the launches: hashable.
    """
    together = 0
    for t in tensors:
        together |= t.data_ptr()
    kinds = (tensors[0].device, *[t.dtype for t in tensors])
    if together & 15:
        kinds += tuple([t.data_ptr() & 15 == 0 for t in tensors])
    return find(kinds, *what)


def launch(kernel: Any, programs: int, x: Any, /, *args: Any, **meta: Any) -> Any:
    """Start a kernel on the device where x, its first argument, is; return what it compiled to.

    Args:
        kernel: of `triton.jit`; its parameters are x, those of args, then constants.
        programs: how many.
        x: see above.
        args: tensors, numbers, None, and tuples of numbers, which stand for what they hold. A
            number of its own may change from launch to launch where it is no integer; what tuples
            hold is looked up by value.
        meta: constants, and options of Triton such as num_warps.
    """
    device = x.device
    index = device.index
    if index is not None and index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return launch(kernel, programs, x, *args, **meta)
    # Not the kernel itself, whose hash is slow.
    kinds: list[Any] = [id(kernel), index, *meta.values()]
    values: list[Any] = []
    for value in (x, *args):
        kind = type(value)
        if kind in _TENSORS or isinstance(value, Tensor):
            address = value.data_ptr()
            values.append(address)
            # What a compiled program depends on: it reads aligned vectors, and takes 1 as constant.
            # A tensor elsewhere is of no kind that was compiled: Triton refuses it.
            usual = address & 15 == 0 and value.device == device
            kinds.append(value.dtype if usual else (value.dtype, value.device, address & 15 == 0))
        elif kind is tuple:
            values += value
            kinds.append(value)
        else:
            values.append(value)
            kinds.append(kind if kind is float else value)
    key = tuple(kinds)
    found = _COMPILED.get(key)
    if found is not None:
        _, run, function, metadata, constants, *_ = found
        stream = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
        # What Triton itself calls in the end; the three are for those who watch launches.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
        return found
    given = [v for value in args for v in (value if isinstance(value, tuple) else (value,))]
    compiled = kernel[(programs,)](x, *given, **meta, **OPTIONS)
    if compiled is not None and _takes_values():  # None, as the interpreter returns
        if len(_COMPILED) >= _MOST:
            _COMPILED.pop(next(iter(_COMPILED)), None)
        constants = [meta[name] for name in kernel.arg_names[len(values) :]]
        started = index, compiled.run, compiled.function, compiled.packed_metadata, constants
        _COMPILED[key] = found = *started, kernel, compiled  # which are to live as long
    return found


@functools.cache
def _takes_values() -> bool:
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return _OLDEST <= version <= _NEWEST
