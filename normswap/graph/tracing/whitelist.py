"""What a forward may read from outside of its module, if a graph is to stand for it.

Functions, classes and immutable constants may be read: a graph either calls them anew in each run
or compares them with what they were. Anything else that a name leads to, and every function whose
result or effect may differ from run to run, ends the trace.
"""

import enum
import functools
import sys
import types
from typing import Any

import torch
from torch import nn

from normswap.graph.code.library import is_library, is_torch

CONSTANTS = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), enum.Enum),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout),
)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_CALLED = (*FUNCTIONS, types.MethodType, types.MethodDescriptorType)

_BUILTINS = frozenset(
    "abs all any bool bytes chr complex dict divmod enumerate filter float format frozenset "
    "getattr hasattr int isinstance issubclass iter len list map max min next object ord pow "
    "property range repr reversed round set slice sorted staticmethod str sum super tuple "
    "zip".split()
)
_PURE = frozenset(
    "math cmath operator _operator functools _functools itertools collections _collections typing "
    "enum dataclasses numbers string types abc re".split()
)
# Functions of torch that look at no tensor and change nothing, and those that make tensors: these
# are calls in the graph.
_TORCH = frozenset(
    "is_scripting is_tracing is_exporting is_compiling is_dynamo_compiling is_fx_tracing "
    "is_torchdynamo_compiling annotate unused _assert finfo iinfo broadcast_shapes promote_types "
    "result_type can_cast is_floating_point is_complex _single _pair _triple zeros ones empty full "
    "arange linspace logspace eye tensor as_tensor rand randn randint randperm normal meshgrid "
    "scalar_tensor from_numpy hann_window hamming_window zeros_like ones_like empty_like full_like "
    "rand_like randn_like".split()
)
_TORCH_MODULES = (
    *("torch.nn.functional", "torch._C._nn", "torch.functional", "torch.nn.init", "torch.fft"),
    *("torch.linalg", "torch.special", "torch._ops", "torch.ops"),
)
# Of a class: whether its attributes can be set (Py_TPFLAGS_HEAPTYPE).
_CHANGEABLE = 1 << 9


def cannot_change(cls: type) -> bool:
    """Return whether nobody changes a class: it is of a library, or written in C."""
    return is_library(cls.__module__) or not cls.__flags__ & _CHANGEABLE


def is_constant(value: Any) -> bool:
    """Return whether a value is immutable and can be compared."""
    return isinstance(value, CONSTANTS) and cannot_change(type(value))


def is_apply(value: object) -> bool:
    """Return whether a value applies a function of autograd: run on symbols, it has no backward."""
    owner = getattr(value, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def why_unfit(value: object, name: str, asks: bool = False) -> str:
    """Return why a forward that reads this may not become a graph; "" where it may.

    Args:
        value: what a name, or an attribute of what it means, leads to.
        name: that name.
        asks: whether something is only compared with it.
    """
    if asks and isinstance(value, tuple) and all(isinstance(part, type) for part in value):
        return ""
    if is_constant(value):
        return ""
    if isinstance(value, type | types.GenericAlias | types.UnionType) or _module(value) == "typing":
        if isinstance(value, type) and not asks and not cannot_change(value):
            made = not issubclass(value, BaseException)
            return f"makes or hands on a {name}, whose attributes may change" if made else ""
        return _unfit_class(value, name)
    owner = getattr(value, "__self__", None)
    if isinstance(value, _CALLED) and isinstance(owner, type | nn.Module | types.ModuleType | None):
        return _unfit_function(value, name)
    return f"reads {name}, a {type(value).__name__} outside of it that may change"


def needs_guard(value: object, holders: list[Any]) -> bool:
    """Return whether a name that leads to a value, by way of holders, may mean another later."""
    modules = [h.__name__ for h in holders if isinstance(h, types.ModuleType)]
    if any(is_torch(name) for name in modules):
        return False
    if isinstance(value, tuple) or is_constant(value):
        return True
    return not (is_torch(_module(value)) or _module(value) == "builtins")


def _module(value: object) -> str:
    # Functions made in C by torch have no module.
    found = getattr(value, "__module__", None)
    return found if isinstance(found, str) else "torch" if _of_torch(value) else "builtins"


def _of_torch(value: object) -> bool:
    owner = getattr(value, "__self__", None)
    return isinstance(value, types.BuiltinFunctionType) and "torch" in repr(owner or value)


def _unfit_class(value: object, name: str) -> str:
    root = _module(value).partition(".")[0]
    library = root in sys.stdlib_module_names and root not in (*_PURE, "builtins")
    library |= type(value).__name__ == "tensortype"  # torch.FloatTensor asks no value for its class
    if not library or (isinstance(value, type) and issubclass(value, BaseException)):
        return ""
    return f"uses the class {_module(value)}.{name}"


def _unfit_function(value: object, name: str) -> str:
    if is_apply(value):
        return f"calls {name}(), of a function of autograd"
    module, name = _module(value), getattr(value, "__name__", name)
    root = module.partition(".")[0]
    if module == "builtins":
        fit = name in _BUILTINS or isinstance(value, types.MethodDescriptorType)
        return "" if fit else f"calls {name}()"
    if is_torch(module) and not module.startswith("normswap."):
        fit = name in _TORCH or module.startswith(_TORCH_MODULES) or id(value) in _overridable()
        return "" if fit else f"calls {module}.{name}()"
    if root == "numpy":
        return f"calls {module}.{name}()" if "random" in module else ""
    if root in sys.stdlib_module_names:
        return "" if root in _PURE else f"calls {module}.{name}()"
    return ""


@functools.cache
def _overridable() -> frozenset[int]:
    functions = torch.overrides.get_overridable_functions()
    listed = {id(f) for found in functions.values() for f in found}
    return frozenset(listed | {id(f) for f in torch.overrides.get_testing_overrides()})
