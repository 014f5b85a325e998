"""Change a model's modules in place, with a way back."""

import functools
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from operator import setitem
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _forward_unimplemented

from normswap.errors import ConversionError
from normswap.graph.install import install, uninstall
from normswap.graph.not_copied import find_pinned, functions_of
from normswap.graph.prepare import prepare_default
from normswap.graph.scope.scope import Scope
from normswap.graph.state import ContainerState, state_of
from normswap.graph.tracing import TraceSession
from normswap.util.elements import elements_of, slots_of
from normswap.util.original_class import ORIGINAL, STATE

_PLAIN = (bool, int, float, str, type(None), torch.Size, Tensor)
_TABLES = (dict, OrderedDict, list, set, tuple)
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "scope"}


class Surgery:
    """Swaps layers and installs forwards; a ``with`` block that fails leaves the model as it was.

    Args:
        model: changed in place.
        trace: whether containers may run a graph in place of their own forward.
    """

    def __init__(self, model: nn.Module, trace: bool = True) -> None:
        self.model = model
        self.trace = trace
        self._installed: list[nn.Module] = []
        self._undo = ExitStack()

    def __enter__(self) -> "Surgery":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            while self._installed:
                uninstall(self._installed.pop())
            self._undo.close()

    def swap(self, names: Iterable[str], layer: nn.Module) -> None:
        """Put one layer at every name of a module."""
        for name in names:
            parent_name, _, leaf = name.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            self._undo.callback(setitem, parent._modules, leaf, parent._modules[leaf])
            parent._modules[leaf] = layer

    def replace_references(self, layers: dict[int, nn.Module]) -> None:
        """Replace norms that modules also hold in attributes, and in what is held there.

        Args:
            layers: id of a replaced norm -> its layer.

        Raises:
            ConversionError: what cannot be changed, as a tuple or a bound method, holds a norm and
                would go on running it.
        """
        waiting: list[tuple[str, str, Any, Any, Any]] = []
        met, pinned = set[int](), set[tuple[int, bool]]()
        waiting += [(where, "", None, None, f) for where, f in functions_of(self.model)]
        for name, module in self.model.named_modules():
            met.add(id(module))
            for key, value in vars(module).items():
                if not (_holds_nothing(value) or _is_own(key)):
                    waiting.append((f"{name}.{key}".lstrip("."), "", vars(module), key, value))
        while waiting:
            where, kind, table, key, value = waiting.pop()
            if id(value) in layers:
                if table is None:
                    _refuse_holder(where, kind, layers[id(value)])
                self._undo.callback(setitem, table, key, value)
                table[key] = layers[id(value)]
            elif not _holds_nothing(value) and id(value) not in met:
                met.add(id(value))
                waiting += [(where, *part) for part in _parts_of(value, pinned)]

    def install(self, sites: list[str], scope: Scope, layers: tuple[type, ...]) -> None:
        """Install a forward that takes the context in every container on the way to a site.

        Args:
            sites: names of the swapped layers, aliases included.
            scope: of the model.
            layers: classes of the swapped layers.
        """
        containers = list(find_containers(self.model, sites).items())
        for module, name in containers:
            install(module, ContainerState(name, scope, layers, sites[0], self.trace))
            self._installed.append(module)
        if not self.trace:
            return
        with TraceSession(layers) as session:
            for module, _ in containers:
                prepare_default(module, session)

    def release(self, modules: list[nn.Module]) -> None:
        """Undo `install` of some containers; the others are traced anew, around these."""
        released = {id(module) for module in modules}
        self._installed = [m for m in self._installed if id(m) not in released]
        for module in modules:
            uninstall(module)
        states = [(module, vars(module)[STATE]) for module in self._installed]
        layers = next((state.layers for _, state in states if state.layers), ())
        with TraceSession(layers) as session:
            for module, state in reversed(states):
                if self.trace and not state.runs_own_forward:
                    state.variants.clear()
                    prepare_default(module, session)

    def add(self, module: nn.Module, name: str, layer: nn.Module) -> str:
        """Add a child under a free name like `name`; return the name."""
        free = name
        count = 0
        while hasattr(module, free):
            count += 1
            free = f"{name}_{count}"
        module.add_module(free, layer)
        self._undo.callback(module._modules.pop, free)
        return free

    def install_inserted(self, states: dict[nn.Module, ContainerState]) -> None:
        """Install a forward that calls the added children, its signature unchanged.

        Raises:
            ConversionError: a container whose graph cannot take its insertions.
        """
        blocks = [state.fqn for state in states.values() if state.insertions]
        if blocks and not self.trace:
            raise ConversionError(
                f"cannot insert a layer inside the forward of {blocks[0] or 'the model'} with "
                "trace=False, since a forward is only changed by way of its graph; leave trace= "
                "out, or use placement='norm' or 'input'"
            )
        for module, state in states.items():
            install(module, state, contextual=False)
            self._installed.append(module)
        with TraceSession() as session:
            for module, state in states.items():
                if not state.insertions:
                    continue
                prepare_default(module, session)
                reason = next((v.reason for v in state.seen() if v.run is None), None)
                if reason is not None:
                    where = state.fqn or "the model itself"
                    raise ConversionError(
                        f"cannot insert a layer in {where}: it {reason}; "
                        f"leave it out with exclude={state.fqn!r}"
                    )

    def install_around(self, module: nn.Module, state: ContainerState, contextual: bool) -> None:
        """Install a forward that runs added children before and after the module's own."""
        install(module, state, contextual)
        self._installed.append(module)


def _holds_nothing(value: Any) -> bool:
    """Return whether a value can hold no norm: most attributes are plain, or empty tables."""
    return isinstance(value, _PLAIN) or (type(value) in _TABLES and not value)


def _is_own(key: str) -> bool:
    """Return whether an attribute is what every module has, or what a conversion put there."""
    return key in _OWN or key.startswith(STATE)


def _parts_of(value: Any, pinned: set[tuple[int, bool]]) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield what a value holds: what kind of holder it is, and a table, a key and the part there.

    The table is None where the part cannot be exchanged for another; `pinned` is for functions.
    """
    fixed: list[Any]
    if isinstance(value, types.FunctionType):
        fixed, kind = list(find_pinned(value, pinned)), "a function"
    elif isinstance(value, functools.partial):
        fixed, kind = [value.func, *value.args, *value.keywords.values()], "a function of the norm"
    elif isinstance(value, types.MethodType | types.BuiltinMethodType):
        fixed, kind = [value.__self__, getattr(value, "__func__", None)], "a function of the norm"
    elif isinstance(value, weakref.ref):
        fixed, kind = [value()], "a weak reference"
    elif type(value) in weakref.ProxyTypes:
        fixed, kind = [value.__init__.__self__], "a weak proxy"
    elif isinstance(value, tuple | set | frozenset):
        fixed, kind = [*elements_of(value)], f"a {type(value).__name__}"
    elif isinstance(value, nn.Module):
        fixed = [*value.children(), *(v for k, v in vars(value).items() if not _is_own(k))]
        kind = f"a {type(value).__name__} that is none of the model's modules"
    else:
        slots = [getattr(value, name) for name in slots_of(value) if hasattr(value, name)]
        fixed, kind = slots, "the slots of an object"
        if isinstance(value, dict):
            fixed, kind = [*dict.keys(value)], "the keys of a dict"
        yield from (("", value, *entry) for entry in _entries(value))
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not isinstance(value, type | types.ModuleType):
            yield from (("", attributes, *entry) for entry in _entries(attributes))
    yield from ((kind, None, None, part) for part in fixed)


def _entries(value: Any) -> list[tuple[Any, Any]]:
    """Return the keys and values of what can be changed by key; else none."""
    if isinstance(value, list | deque):
        return [*enumerate(elements_of(value))]
    return [*dict.items(value)] if isinstance(value, dict) else []


def _refuse_holder(where: str, holder: str, layer: nn.Module) -> NoReturn:
    original = vars(layer).get(ORIGINAL)  # a norm that is put back has none
    way_out = "hold its name there"
    if original is not None:
        way_out = f"leave that norm out with exclude={original.site.fqn!r}"
    raise ConversionError(
        f"cannot convert: {where} holds a norm to be replaced in {holder}, which would go on "
        f"running it; {way_out}"
    )


def restore_forwards(model: nn.Module) -> None:
    """Give every converted container its own class and forward again; drop inserted layers."""
    for module in list(model.modules()):
        state = state_of(module)
        base = getattr(type(module), "_normswap_from", None)
        if state is not None:
            for child in state.children():
                module._modules.pop(child, None)
            uninstall(module)
        elif base is not None:  # a slice that never ran
            module.__class__ = base


def find_containers(model: nn.Module, sites: Iterable[str]) -> dict[nn.Module, str]:
    """Return the modules above the sites that have a forward, with their names, root first."""
    found: dict[nn.Module, str] = {}
    for site in sites:
        module: Any = model
        parts = site.split(".")
        for depth, part in enumerate(parts):
            has_forward = type(module).forward is not _forward_unimplemented
            if has_forward or "forward" in vars(module):
                found.setdefault(module, ".".join(parts[:depth]))
            module = module.get_submodule(part)
    return found
