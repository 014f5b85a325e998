"""Build the graph of one container: its nodes, its symbolic values, and what it read."""

import functools
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TracerBase

from normswap.graph.tracing.handed import NOTHING, Effects, hand_on, take_back
from normswap.graph.tracing.held import Held, is_plain, snapshot
from normswap.graph.tracing.live import SWITCHES
from normswap.graph.tracing.mutates import changes, gives_back
from normswap.graph.tracing.names import Names, returns_tensor
from normswap.graph.tracing.outline import Outlined, methods_running
from normswap.graph.tracing.patches import TraceFailure
from normswap.graph.tracing.questions import MOST_QUESTIONS, is_pure, question_key
from normswap.graph.tracing.region import Region
from normswap.graph.tracing.symbol import Value, unpack
from normswap.graph.tracing.values import describe
from normswap.graph.tracing.watched import check_lists, watch_lists

_BASE = set(vars(nn.Module())) - {"training"}


@dataclass
class Traced:
    """A graph, and what must still hold for it to stand for the forward.

    Attributes:
        graph: its placeholders are the symbolic parts of the arguments, in order.
        reads: (path of the module, attribute) -> the value the forward saw.
        structure: path of a module whose children the forward walked -> their names.
        regions: checkpointed parts, each with the node of the graph that calls it.
        children: path of a submodule that is called -> whether it certainly returns a tensor.
        plain: whether everything the forward read is in `reads` and `structure`.
        outlined: nodes that call a method of the container.
        questions: nodes whose truth the forward branched on.
        answers: the truth this trace took them for.
        asked_in: methods of the container that asked.
        effects: on the lists and dicts it is given; where it changes some, the graph returns
            (output, their new contents).
        assumed: (child, arguments like those it was called with) for those that were taken to
            leave every list and dict they are given alone.
        last: call after which nothing may follow that could change anything.
        failure: why this path ends after its last question; "" where the forward returns.
    """

    graph: fx.Graph
    reads: dict[tuple[str, str], Any] = field(default_factory=dict)
    structure: dict[str, tuple[str, ...]] = field(default_factory=dict)
    regions: list[tuple[fx.Node, Region]] = field(default_factory=list)
    children: dict[str, bool] = field(default_factory=dict)
    plain: bool = True
    outlined: list[fx.Node] = field(default_factory=list)
    questions: list[fx.Node] = field(default_factory=list)
    answers: tuple[bool, ...] = ()
    asked_in: list[str] = field(default_factory=list)
    effects: Effects = NOTHING
    assumed: list[tuple[nn.Module, tuple[Any, ...]]] = field(default_factory=list)
    last: fx.Node | None = None
    failure: str = ""


class ContainerTracer(fx.Tracer):
    """Builds the graph of one container.

    Args:
        root: the container.
        names: of its modules and tensors.
        answers: to the first questions whether a symbolic value is true; True to those after.
        outlined: names of methods of the container that are called, not entered.
        probed: what is known of modules that are given lists or dicts, by `probe_key`.
    """

    def __init__(
        self,
        root: nn.Module,
        names: Names,
        answers: tuple[bool, ...] = (),
        outlined: tuple[str, ...] = (),
        probed: dict[Any, Effects | None] | None = None,
    ) -> None:
        super().__init__()
        self.root = root
        self.given = answers
        self.outlined = outlined
        self.probed = {} if probed is None else probed
        self.known: dict[Any, bool] = {}
        self.reshaped = 0
        self.graph = fx.Graph(tracer_cls=type(self))
        self.result = Traced(self.graph)
        self.paths, self.tensors = names.paths, names.tensors
        self.modes = _modes()
        self.held = Held()
        self.region: Region | None = None

    def proxy(self, node: fx.Node) -> Value:
        """Wrap a node."""
        return Value(node, self)

    def iter(self, obj: Any) -> Iterator[Any]:
        """Take a symbolic value apart."""
        parts = unpack(obj)
        return super().iter(obj) if parts is None else parts

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer whether a symbolic value is true, for this path."""
        if self.region is not None:
            raise TraceFailure("branches inside a checkpointed part on a value known when it runs")
        key = question_key(obj.node)
        key = key and (key, self.reshaped)
        if key in self.known:
            return self.known[key]
        result, place = self.result, len(self.result.answers)
        result.asked_in += methods_running(self.root, sys._getframe(1))[:1]
        if place >= MOST_QUESTIONS:
            raise TraceFailure("branches endlessly on values only known when it runs")
        answer = self.given[place] if place < len(self.given) else True
        result.questions.append(self.create_proxy("call_function", bool, (obj,), {}).node)
        result.answers = (*result.answers, answer)
        if key is not None:
            self.known[key] = answer
        return answer

    def check_last(self) -> None:
        """Raise where something follows the call that nothing may follow."""
        nodes = list(self.graph.nodes)
        last = self.result.last
        if last is not None and not all(map(is_pure, nodes[nodes.index(last) + 1 : -1])):
            raise TraceFailure("goes on with a list or dict that a call returns inside another")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node, unless the forward changed a mode that a graph does not carry."""
        if _modes() != self.modes:
            raise TraceFailure(SWITCHES)
        if args[0] == "call_method" and args[1].endswith("_"):
            self.reshaped += 1  # what was asked of its shape may have another answer now
        return self.graph.create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Turn an argument of a call into one of a node."""
        if isinstance(a, fx.Proxy):
            if a.node.graph is self.graph:
                return a.node
            if self.region is None or a.node.graph is not self.result.graph:
                raise TraceFailure("a checkpointed part is used outside of it")
            return self.region.capture(a.node)
        if isinstance(a, Tensor):
            if id(a) not in self.tensors:
                raise TraceFailure("uses a tensor that is not an attribute of the module")
            return self.create_node("get_attr", self.tensors[id(a)], (), {})
        if isinstance(a, nn.Module):
            raise TraceFailure(f"passes a module ({type(a).__name__}) as an argument")
        if isinstance(a, dict) and type(a) is not dict:
            return self._create_mapping(a)
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            # A call, since before torch 2.10 generated code does not know the class by name.
            args = tuple(self.create_arg(part) for part in a)
            return self.create_node("call_function", type(a), args, {})
        if isinstance(a, list | tuple) and type(a) not in (list, tuple) and _is_plain_subclass(a):
            raise TraceFailure(f"builds a {type(a).__name__}")
        return TracerBase.create_arg(self, a)

    def _create_mapping(self, a: Any) -> fx.Node:
        if is_dataclass(a):
            given = {f.name: v for f in fields(a) if (v := getattr(a, f.name)) is not None}
            kwargs = {k: self.create_arg(v) for k, v in given.items()}
            return self.create_node("call_function", type(a), (), kwargs)
        if type(a) is OrderedDict:
            items = [(k, self.create_arg(v)) for k, v in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        raise TraceFailure(f"builds a {type(a).__name__}")

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Record the call of a submodule."""
        path = self.paths.get(id(module))
        if not path:
            raise TraceFailure(f"calls a {type(module).__name__} that is not registered below it")
        if "." in path:
            parent = path.rpartition(".")[0]
            children = tuple(self.root.get_submodule(parent)._modules)
            self.result.structure[parent] = children
            while "." in parent:
                parent = parent.rpartition(".")[0]
                self.result.structure[parent] = tuple(self.root.get_submodule(parent)._modules)
        args, kwargs, handed = hand_on(self, module, args, kwargs)
        proxy = self.create_proxy("call_module", path, args, kwargs)
        something = self.result.children[path] = returns_tensor(module)
        proxy.node.meta["something"] = something
        return take_back(self, module, handed, proxy)

    def _call_method(self, method: Outlined, *args: Any, **kwargs: Any) -> Any:
        args, kwargs, nodes = watch_lists(self, args, kwargs)
        code = getattr(type(self.root), method.name).__code__
        if nodes and (changes(code) or gives_back(code)):
            raise TraceFailure(f"hands a list or dict to .{method.name}, which may change it")
        itself = self.create_proxy("get_attr", "converted_container", (), {})
        value = self.create_proxy("call_function", method, (itself, *args), kwargs)
        (self.region or self.result).outlined.append(value.node)
        check_lists(self, method.name, nodes, None)
        return value

    def read(self, module: nn.Module, name: str, value: Any) -> Any:
        """Note an attribute the forward saw; parameters and buffers become symbolic."""
        path = self.paths.get(id(module))
        if path is None:
            return value
        if isinstance(value, Tensor):
            return (
                self.create_proxy("get_attr", self.tensors[id(value)], (), {})
                if (id(value) in self.tensors)
                else value
            )
        of_class = callable(value) and name not in vars(module)
        if of_class and module is self.root and name in self.outlined:
            return functools.partial(self._call_method, Outlined(name))
        if name not in _BASE and not of_class:
            if is_plain(value):
                self.result.reads.setdefault((path, name), snapshot(value))
            else:
                self.held.hold(f"{path}.{name}".lstrip("."), value)
        return value


def probe_key(module: nn.Module, values: tuple[Any, ...]) -> Any:
    """Return what identifies a call of a module on arguments like these."""
    return (id(module), tuple([describe(value, [], True) for value in values]))


def _is_plain_subclass(a: Any) -> bool:
    return not hasattr(a, "_fields") and not type(a).__module__.startswith("torch.fx")


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
