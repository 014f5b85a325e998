"""Build the graph of one container: its nodes, its symbolic values, and what it read."""

import types
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from normswap.graph.code.library import is_torch
from normswap.graph.tracing.failure import TraceFailure
from normswap.graph.tracing.list_effects import check_handed
from normswap.graph.tracing.reads import ANY_TENSOR, Reads
from normswap.graph.tracing.symbol import Value
from normswap.util.original_class import container_class

# What every module holds, and what reads of it without changing anything.
_BASE = {"__dict__", *vars(nn.Module())} - {"training"}
_READERS = {
    *("forward", "children", "named_children", "modules", "named_modules", "parameters"),
    *("named_parameters", "buffers", "named_buffers", "get_submodule", "get_parameter"),
    *("get_buffer", "extra_repr", "_get_name"),
}
_LOOPS = "loops over, or takes apart, a value whose length is known only when it runs"


class ContainerTracer(fx.Tracer):
    """Builds the graph of one container.

    Args:
        root: the container.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph(tracer_cls=type(self))
        self.reads = Reads()
        named = dict(root.named_modules())
        self._paths = {id(module): name for name, module in named.items()}
        self._tensors = _names_of_tensors(named)

    def proxy(self, node: fx.Node) -> Value:
        """Wrap a node."""
        return Value(node, self)

    def iter(self, obj: object) -> Iterator[Any]:
        """Refuse to take a symbolic value apart, but for what torch.fx knows."""
        raise TraceFailure(_LOOPS)

    def keys(self, obj: object) -> Any:
        """Refuse to unpack a symbolic value as a mapping."""
        raise TraceFailure(_LOOPS)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse to branch on a symbolic value."""
        raise TraceFailure("branches on a value that is known only when it runs")

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
        basic = type(a) in (list, tuple, dict) or type(a).__module__.startswith("torch.fx")
        if isinstance(a, list | tuple | dict) and not basic:
            raise TraceFailure(f"builds a {type(a).__name__}")
        try:
            return TracerBase.create_arg(self, a)
        except NotImplementedError:
            raise TraceFailure(f"hands on an object of class {type(a).__name__}") from None

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        check_handed((args, tuple(kwargs.values())), f"a {container_class(module).__name__}")
        return self.create_proxy("call_module", path, args, kwargs)

    def miss(self, module: nn.Module, name: str) -> None:
        """Refuse what a module does not have, and may be given later."""
        if id(module) in self._paths:
            kind = type(module).__name__
            raise TraceFailure(f"asks a {kind} for .{name}, which it does not have")

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
        if name in _BASE:
            raise TraceFailure(f"looks into its own {name}")
        if isinstance(value, nn.Module):
            if isinstance(value, nn.ParameterList | nn.ParameterDict):
                raise TraceFailure(f"reads .{name}, whose parameters may be others")
            for part in (module, value):  # a forward may count their children, or go through them
                if id(part) in self._paths:
                    self.reads.children[self._paths[id(part)]] = tuple(part._modules)
            return value
        function = getattr(value, "__func__", value)
        if name in vars(module) or not isinstance(function, types.FunctionType):
            self.reads.attribute(path, name, value)
            return value
        if vars(nn.Module).get(name) is function and name not in _READERS:
            raise TraceFailure(f"calls .{name}() inside forward")
        if not is_torch(function.__module__):
            self.reads.method(path, name, function)
        return value


def structure_of(root: nn.Module) -> Hashable:
    """Return what containers share whose graphs are the same, where guards hold, too."""
    named = dict(root.named_modules())
    modules = tuple((name, type(module)) for name, module in named.items())
    return modules, tuple(_names_of_tensors(named).values())


def _names_of_tensors(named: dict[str, nn.Module]) -> dict[int, str]:
    """Return the name of each parameter, buffer and other tensor attribute, by id."""
    found: dict[int, str] = {}
    for name, module in named.items():
        held = object.__getattribute__(module, "__dict__")  # past what tracing puts in between
        # Scripted modules keep theirs elsewhere.
        tables = [held[t] if t in held else getattr(module, t) for t in ("_parameters", "_buffers")]
        for table in (*tables, held):
            for key, value in table.items():
                if isinstance(value, Tensor):
                    found.setdefault(id(value), f"{name}.{key}" if name else key)
    return found


def _overrides_call(cls: type) -> bool:
    owner = next(base for base in cls.__mro__ if "__call__" in vars(base))
    return not is_torch(owner.__module__)
