"""How a kernel is started: by Triton once for each kind of arguments, then without asking again.

Triton looks at every argument of every launch to find the program that was compiled for its kind.
Without that a training step of a CN layer, eight launches, took .74 ms of host time more than batch
norm's in place of .85, on a machine with an H100.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

_TENSORS = {Tensor, nn.Parameter}
# By kernel, device and kinds of arguments. Some programs serve a shape each: the oldest make room.
_COMPILED: dict[tuple[Any, ...], Any] = {}
_MOST = 8192
# Versions of Triton whose programs take what is handed to them below; others are asked each time.
_OLDEST, _NEWEST = (3, 5), (3, 9)
# One rounding for a product and a sum. Triton 3.9 warns where it is left open, 3.10 changes it.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel: Any, programs: int, x: Tensor, /, *args: Any, **meta: Any) -> None:
    """Start a kernel on the device where x, its first argument, is.

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
            place = value.data_ptr()
            values.append(place)
            # What a compiled program depends on: it reads aligned vectors, and takes 1 as constant.
            # A tensor elsewhere is of no kind that was compiled: Triton refuses it.
            usual = place & 15 == 0 and value.device == device
            kinds.append(value.dtype if usual else (value.dtype, value.device, place & 15 == 0))
        elif kind is tuple:
            values += value
            kinds.append(value)
        else:
            values.append(value)
            kinds.append(kind if kind is float else value)
    key = tuple(kinds)
    found = _COMPILED.get(key)
    if found is not None:
        run, function, metadata, constants, *_ = found
        stream = 0 if index is None else torch._C._cuda_getCurrentRawStream(index)
        # What Triton itself calls in the end; the three are for those who watch launches.
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values, *constants)
        return None
    given = [v for value in args for v in (value if isinstance(value, tuple) else (value,))]
    compiled = kernel[(programs,)](x, *given, **meta, **OPTIONS)
    if compiled is not None and _takes_values():  # None, as the interpreter returns
        if len(_COMPILED) >= _MOST:
            del _COMPILED[next(iter(_COMPILED))]
        constants = [meta[name] for name in kernel.arg_names[len(values) :]]
        started = compiled.run, compiled.function, compiled.packed_metadata, constants
        _COMPILED[key] = *started, kernel, compiled  # which are to live as long
    return None


@functools.cache
def _takes_values() -> bool:
    import triton

    version = tuple(map(int, triton.__version__.split(".")[:2]))
    return _OLDEST <= version <= _NEWEST
