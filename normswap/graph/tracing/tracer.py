"""Build the graph of one container: its nodes, its symbolic values, and what it read."""

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from normswap.graph.tracing.constant_calls import SWITCHES
from normswap.graph.tracing.failure import TraceFailure, is_torch
from normswap.graph.tracing.list_effects import hands_lists
from normswap.graph.tracing.names import Names, returns_tensor
from normswap.graph.tracing.reads import ANY_TENSOR, MISSING, Guards, Reads
from normswap.graph.tracing.symbol import Value
from normswap.graph.tracing.traced import Traced
from normswap.util.original_class import container_class

# What every module holds, and what reads of it without changing anything.
_BASE = {"__dict__", *vars(nn.Module())} - {"training"}
_READERS = {
    *("forward", "children", "named_children", "modules", "named_modules", "parameters"),
    *("named_parameters", "buffers", "named_buffers", "get_submodule", "get_parameter"),
    *("get_buffer", "extra_repr", "_get_name"),
}
_LOOPS = "loops over, or takes apart, a value whose length is known only when it runs"
# Of a call: what the graph depends on that stands for the callee, None where none does.
GuardsOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Guards | None]


class ContainerTracer(fx.Tracer):
    """Builds the graph of one container.

    Args:
        root: the container.
        names: of its modules and tensors.
        guards_of: of the graph of a callee that is given lists or dicts.
    """

    def __init__(self, root: nn.Module, names: Names, guards_of: GuardsOf) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.result = Traced(self.graph, names)
        self.reads = Reads()
        self.texts: list[str] = []  # of symbolic values, so far for nothing known
        self._paths, self._tensors = names.paths, names.tensors
        self._modes = _modes()
        self._guards_of = guards_of

    def proxy(self, node: fx.Node) -> Value:
        """Wrap a node."""
        return Value(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """Refuse to take a symbolic value apart, but for what torch.fx knows."""
        raise TraceFailure(_LOOPS)

    def keys(self, obj: Any) -> Any:
        """Refuse to unpack a symbolic value as a mapping."""
        raise TraceFailure(_LOOPS)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse to branch on a symbolic value."""
        raise TraceFailure("branches on a value that is known only when it runs")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless the forward changed a mode that a graph does not carry."""
        if _modes() != self._modes:
            raise TraceFailure(SWITCHES)
        if args[1] is torch._assert:
            message = str(args[2][1:])
            for text in [text for text in self.texts if text in message]:
                self.texts.remove(text)
                message = message.replace(text, "", 1)
        return self.graph.create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Turn an argument of a call into one of a node."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) not in self._tensors:
                raise TraceFailure("uses a tensor that is not an attribute of the module")
            return self._get(a).node
        if isinstance(a, nn.Module):
            raise TraceFailure(f"passes a module ({type(a).__name__}) as an argument")
        if type(a) is OrderedDict:
            items = [(k, self.create_arg(v)) for k, v in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        known = type(a) in (list, tuple, dict) or type(a).__module__.startswith("torch.fx")
        if isinstance(a, list | tuple | dict) and not known:
            raise TraceFailure(f"builds a {type(a).__name__}")
        try:
            return TracerBase.create_arg(self, a)
        except NotImplementedError:
            raise TraceFailure(f"hands on an object of class {type(a).__name__}") from None

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Record the call of a submodule."""
        path = self._paths.get(id(module))
        if not path:
            raise TraceFailure(f"calls a {type(module).__name__} that is not registered below it")
        if _overrides_call(container_class(module)):
            raise TraceFailure(f"calls a {type(module).__name__}, which has a __call__ of its own")
        parent = path
        while parent:
            parent = parent.rpartition(".")[0]
            children = tuple(self.root.get_submodule(parent)._modules)
            self.reads.children[parent] = children
        if hands_lists(self, module, (*args, *kwargs.values())):
            self.result.alike = False  # it depends on more than the class of the callee
            guards = self._guards_of(module, args, kwargs)
            if guards is None:
                name = container_class(module).__name__
                raise TraceFailure(f"hands a list or dict to a {name} that may change it")
            self.reads.below(path, guards)
        proxy = self.create_proxy("call_module", path, args, kwargs)
        certain = self.result.children[path] = returns_tensor(module)
        proxy.node.meta["returns_tensor"] = certain
        return proxy

    def _note_children(self, *modules: nn.Module) -> None:
        """Note which children modules have: a forward may count them, or go through them."""
        for module in modules:
            path = self._paths.get(id(module))
            if path is not None:
                self.reads.children[path] = tuple(module._modules)

    def miss(self, module: nn.Module, name: str) -> None:
        """Note that a module has no attribute of this name."""
        path = self._paths.get(id(module))
        if path is not None:
            self.reads.attributes.setdefault((path, name), MISSING)

    def _get(self, tensor: Tensor) -> fx.Proxy:
        """Read a parameter or buffer; the graph stands for a forward as long as there is one."""
        target = self._tensors[id(tensor)]
        path, _, name = target.rpartition(".")
        self.reads.attributes.setdefault((path, name), ANY_TENSOR)
        return self.create_proxy("get_attr", target, (), {})

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Note an attribute the forward saw; parameters and buffers become symbolic."""
        path = self._paths.get(id(module))
        if path is None:
            raise TraceFailure(f"reads .{name} of a {type(module).__name__} outside of it")
        if isinstance(value, Tensor):
            return self._get(value) if id(value) in self._tensors else value
        if name == "_modules":
            self._note_children(module)
            return types.MappingProxyType(value)
        if name in _BASE or name == "__class__":
            raise TraceFailure(f"looks into its own {name}")
        if isinstance(value, nn.Module):
            self._note_children(module, value)
            size = "_size" if isinstance(value, nn.ParameterList) else "_keys"
            if isinstance(value, nn.ParameterList | nn.ParameterDict) and id(value) in self._paths:
                self.reads.attribute(self._paths[id(value)], size, getattr(value, size))
            return value
        function = getattr(value, "__func__", value)
        builtin = isinstance(value, types.BuiltinMethodType | types.MethodWrapperType)
        if name in vars(module) or not (builtin or isinstance(function, types.FunctionType)):
            return self.reads.attribute(path, name, value)
        if builtin:
            return value
        if vars(nn.Module).get(name) is function and name not in _READERS:
            raise TraceFailure(f"calls .{name}() inside forward")
        if not is_torch(function.__module__):
            self.reads.method(path, name, function)
        return value


def _overrides_call(cls: type) -> bool:
    owner = next(base for base in cls.__mro__ if "__call__" in vars(base))
    return not is_torch(owner.__module__)


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
