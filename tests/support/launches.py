"""What a layer would start on a CUDA device, counted on fake tensors: no device is needed."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normswap.functional import backend, label_rows, labels, mixture_fused, tables
from normswap.functional.labels import Context

# Operators that start no kernel besides views; operators that start more than one.
FREE = {
    "_unsafe_view",
    "detach",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
}
SEVERAL = {"index_add": 2, "native_batch_norm_backward": 2, "randperm": 4}


class Cost(NamedTuple):
    """Launches, and reads and writes of tensors as large as x, in bytes of x."""

    launches: int
    passes: float


class Launches(TorchDispatchMode):
    """Counts what operators in its block start, and how often they pass over x."""

    def __init__(self, x):
        super().__init__()
        self.x, self.names, self.moved = x, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name in FREE):
            self.names[name] += SEVERAL.get(name, 1)
            read = (args[1:] if name == "copy_" else args, without_outputs(func, kwargs))
            masked = name == "native_batch_norm_backward" and not args[-1][0]
            self.moved += self.large(read) + self.large(found[1:] if masked else found)
        return found

    def large(self, tree):
        """Return the bytes of what is as large as x, each place in memory once."""
        places = {}
        for t in tree_leaves(tree):
            if isinstance(t, torch.Tensor):
                there = math.prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step)
                if there >= self.x.numel():
                    key = (StorageWeakRef(t.untyped_storage()), t.storage_offset())
                    places[key] = there * t.element_size()
        return sum(places.values())

    def take(self):
        """Return the cost since the last call."""
        cost = Cost(self.names.total(), self.moved / (self.x.numel() * self.x.element_size()))
        self.names, self.moved = Counter(), 0
        return cost


def without_outputs(func, kwargs):
    """Return the arguments that an operator does not only write to."""
    outputs = {a.name for a in func._schema.arguments if a.is_out}
    return {name: value for name, value in kwargs.items() if name not in outputs}


def cost_of(layer, x, *arguments):
    """Return the `Cost` of forward and backward in training, and of forward in evaluation.

    Called within `fake_cuda`, where the layer and x live. Another layer has met the labels.
    """
    dy = torch.empty_like(x)
    layer.train()(x, *arguments)
    with Launches(x) as count:
        y = layer.train()(x, *arguments)
        forward = count.take()
        run_backward(y, dy)
        backward = count.take()
        with torch.no_grad():
            layer.eval()(x, *arguments)
        return forward, backward, count.take()


@torch.no_grad()
def run_backward(y, dy):
    """Run the nodes of a graph in order; autograd's own engine wants the threads of a device."""
    if y.grad_fn is None:
        return
    waiting, found = Counter(), [y.grad_fn]
    for node in found:
        after = [n for n, _ in node.next_functions if n is not None]
        waiting.update(after)
        found += [n for n in dict.fromkeys(after) if n not in found]
    given, ready = {y.grad_fn: {0: dy}}, [y.grad_fn]
    while ready:
        node = ready.pop()
        slots = given.pop(node)
        for (after, slot), grad in edges_of(node, [slots.get(i) for i in range(max(slots) + 1)]):
            grad = grad.sum_to_size(after._input_metadata[slot].shape)  # as the engine does
            had = given.setdefault(after, {}).get(slot)
            given[after][slot] = grad if had is None else had + grad
            waiting[after] -= 1
            if not waiting[after] and after.next_functions:  # else a leaf
                ready.append(after)


def edges_of(node, grads):
    """Run a node; return its edges with what goes along them."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        found = node(*grads)
        found = found if isinstance(found, tuple) else (found,)
        pairs = zip(node.next_functions, found, strict=True)
        return [(edge, grad) for edge, grad in pairs if edge[0] is not None]
    found = zip(node.apply(*grads), node.needs_input_grad, strict=True)
    edges = [edge for edge in node.next_functions if edge[0] is not None]
    return zip(edges, [grad for grad, needed in found if needed], strict=True)


def remembered(unknown, rows):
    """Return labels on the fake device that remember what is made of them, as a model's do."""
    found = torch.zeros(rows, dtype=torch.int64, device="cuda")
    found.memo = labels._Memo(found)
    return Context(found, unknown)


def move(layer):
    """Replace parameters and buffers by those of a fake device."""
    for module in layer.modules():
        for values in (module._parameters, module._buffers):
            for name, t in values.items():
                if t is not None:
                    there = torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    values[name] = nn.Parameter(there) if isinstance(t, nn.Parameter) else there
    return layer


def fake_cuda(monkeypatch):
    """Return a block for fake tensors, which the layers treat as they treat real ones."""
    for module in (tables, mixture_fused):
        monkeypatch.setattr(module, "is_torchs_own", lambda t: True)
    for module in (backend, label_rows):
        monkeypatch.setattr(module, "is_traced", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FakeTensorMode()
