"""What can be seen of values: their structure, and the tensors in them."""

import collections
import dataclasses
import functools
import inspect
import types

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from normswap.methods.layer import ContextLayer

_HIDDEN = {
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_is_full_backward_hook",
    "call_super_init",
    "_compiled_call_impl",
    "no_weight_decay",
}
_FOREIGN = ("normswap", "torch.fx")


class Stray(Exception):
    """A value of the conversion's own lies where the program can see it."""


class View:
    """The structure of values, as nested tuples, and the tensors met on the way.

    Lists, dicts and tensors that are one object twice are seen to be.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.met: dict[int, int] = {}
        self.kept: list[object] = []

    def of(self, value, depth: int = 0):
        kind = type(value)
        if value is None or kind in (bool, int, str, bytes, torch.dtype, torch.device, torch.Size):
            return value
        if kind is float:
            return ("float", float(f"{value:.9g}"))
        if kind.__module__.startswith(_FOREIGN) and not isinstance(value, (nn.Module, torch.Size)):
            raise Stray(f"a {kind.__module__}.{kind.__qualname__}")
        if id(value) in self.met:
            return ("again", self.met[id(value)])
        if isinstance(value, (Tensor, list, dict, set, collections.deque)) or depth > 0:
            self.met[id(value)] = len(self.met)
            self.kept.append(value)
        if isinstance(value, Tensor):
            self.tensors.append(value.detach())
            return ("tensor", tuple(value.shape), value.dtype, value.requires_grad, kind.__name__)
        if isinstance(value, (ContextLayer, nn.modules.batchnorm._BatchNorm)):
            return "a norm"
        if depth > 8:
            return kind.__name__
        return (kind.__name__, *self._parts(value, depth + 1))

    def _parts(self, value, depth):
        if isinstance(value, dict):
            return [(self.of(k, depth), self.of(v, depth)) for k, v in value.items()]
        if isinstance(value, (list, tuple, collections.deque)):
            return [self.of(v, depth) for v in value]
        if isinstance(value, set):
            return sorted(map(repr, value))
        if isinstance(value, nn.Module):
            return []
        if isinstance(value, functools.partial):
            return [self.of(v, depth) for v in (value.func, value.args, value.keywords)]
        if hasattr(value, "cache_info"):
            return [value.cache_info().currsize, self.of(value.__wrapped__, depth)]
        if isinstance(value, types.FunctionType):
            cells = [c.cell_contents for c in value.__closure__ or () if _full(c)]
            return [value.__name__, self.of(value.__defaults__, depth), self.of(cells, depth)]
        if dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace):
            return [] if isinstance(value, type) else [self.of(vars(value), depth)]
        return []


def _full(cell) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def see_module(namespace, view: View):
    """Return what the globals and the classes of a program hold."""
    seen = {}
    for name, value in sorted(vars(namespace).items()):
        if name.startswith("__") or isinstance(value, (types.ModuleType, nn.Module)):
            continue
        if isinstance(value, type):
            if value.__module__ == namespace.__name__:
                seen[name] = {
                    k: view.of(v, 1)
                    for k, v in sorted(vars(value).items())
                    if not k.startswith("_") and not isinstance(v, property)
                }
        elif getattr(value, "__module__", namespace.__name__) == namespace.__name__ or (
            type(value).__module__ == "builtins"
            and not isinstance(value, types.BuiltinFunctionType)
        ):
            if inspect.isgenerator(value) or type(value).__name__ == "range_iterator":
                continue
            seen[name] = view.of(value, 1)
        elif isinstance(value, (Tensor, dict, collections.deque, types.SimpleNamespace)):
            seen[name] = view.of(value, 1)
    return seen


def see_model(model: nn.Module, view: View):
    """Return what the modules of a model hold, but for what norms are about."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, (ContextLayer, nn.modules.batchnorm._BatchNorm)):
            seen[name] = module.training
            continue
        # Which of its own functions torch.compile sets as forward depends on the module's library.
        hidden = {*_HIDDEN, "forward"} if isinstance(module, OptimizedModule) else _HIDDEN
        attributes = {
            key: len(value) if "_hooks" in key else view.of(value, 1)
            for key, value in sorted(vars(module).items())
            if key not in hidden and not key.startswith(("_normswap", "_torchdynamo"))
        }
        tensors = {k: view.of(v, 1) for k, v in module._buffers.items()}
        seen[name] = (attributes, tensors, tuple(module._modules), tuple(module._parameters))
    return seen
