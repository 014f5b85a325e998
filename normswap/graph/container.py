"""A container of a converted model: its forward takes the context and hands it to the norms.

The forward is installed through a subclass of the module's own class. It looks for a graph that
was traced for the kinds of its arguments and for the attributes the module has now, and runs it;
where no graph stands for the module's own forward, that forward runs, with the context in scope.
"""

import copy
import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normswap.functional.labels import Context, wrong_length
from normswap.graph.patches import TraceFailure
from normswap.graph.scope import Scope
from normswap.graph.signature import parameters_of, write_forward
from normswap.graph.trace import TraceSession, tracing
from normswap.graph.values import Kind, describe, find_other

_MOST_VARIANTS = 64


@dataclass
class Variant:
    """A way to run a container, and when it applies.

    Attributes:
        run: ``run(module, *leaves, context)``; None runs the module's own forward in scope.
        reason: why there is no graph; "" where there is one.
        reads: (path, attribute, value) the module must still have.
        structure: (path, names of its children) that must still be so.
        calls: paths of the submodules the graph calls.
        threaded: those of them that are passed the context.
        direct: paths of tensors the graph reads itself.
    """

    run: Callable[..., Any] | None
    reason: str = ""
    reads: tuple[tuple[tuple[str, ...], str, Any], ...] = ()
    structure: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()
    calls: tuple[str, ...] = ()
    threaded: tuple[tuple[str, ...], ...] = ()
    direct: tuple[str, ...] = ()

    def holds(self, module: nn.Module) -> bool:
        """Return whether everything the trace depended on is as it was."""
        for path, name, value in self.reads:
            now = getattr(_walk(module, path), name)
            if type(now) is not type(value) or now != value:
                return False
        for path, children in self.structure:
            if tuple(_walk(module, path)._modules) != children:
                return False
        for path in self.threaded:
            if context_argument(_walk(module, path)) is None:
                return False
        return True


class ContainerState:
    """What a converted container carries.

    Attributes:
        fqn: its qualified name in the converted model.
        scope: shared by the whole model.
        layers: classes of the norm layers.
        first_norm: name of the model's first norm, for messages.
        override: a forward that was set on the instance, if any.
        variants: ways to run it, by kinds of arguments.
        exact: kinds for which numbers count as constants.
        assumed: kinds that were traced before any call; calls may bring others.
    """

    def __init__(self, fqn: str, scope: Scope, layers: tuple[type, ...], first_norm: str) -> None:
        self.fqn = fqn
        self.scope = scope
        self.layers = layers
        self.first_norm = first_norm
        self.override: Callable[..., Any] | None = None
        self.variants: dict[tuple[Kind, ...], list[Variant]] = {}
        self.exact: set[tuple[Kind, ...]] = set()
        self.assumed: set[tuple[Kind, ...]] = set()

    def seen(self) -> list[Variant]:
        """Return the variants calls have met, or the assumed ones where none were met yet."""
        met = [v for key, found in self.variants.items() if key not in self.assumed for v in found]
        return met or [v for found in self.variants.values() for v in found]

    def __getstate__(self) -> dict[str, Any]:
        """Functions do not pickle; the kinds do, and each is traced again on loading."""
        kinds = {key: [] for key, found in self.variants.items() if found}
        return {**self.__dict__, "variants": kinds}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ContainerState":
        """Copies share the graphs, which name modules by path."""
        state = type(self)(self.fqn, copy.deepcopy(self.scope, memo), self.layers, self.first_norm)
        state.override = copy.deepcopy(self.override, memo)
        state.variants = {key: list(found) for key, found in self.variants.items()}
        state.exact, state.assumed = set(self.exact), set(self.assumed)
        return state


def context_argument(module: nn.Module) -> str | None:
    """Return the name of a module's context argument, None where it takes none."""
    return getattr(type(module), "context_argument", None)


def _walk(module: nn.Module, path: tuple[str, ...]) -> nn.Module:
    for name in path:
        module = getattr(module, name)
    return module


def dispatch(module: nn.Module, values: tuple[Any, ...], context: Any) -> Any:
    """Run a container: the forward of every converted container ends here."""
    if tracing():
        return own_forward(module, values)
    state: ContainerState = module._normswap  # type: ignore[assignment]
    leaves: list[Any] = []
    key = tuple([describe(value, leaves, False) for value in values])
    if key in state.exact:
        leaves = []
        key = tuple([describe(value, leaves, True) for value in values])
    context = _resolve(state, leaves, context)
    for variant in state.variants.get(key, ()):
        if variant.holds(module):
            break
    else:
        if torch.compiler.is_dynamo_compiling():
            variant = Variant(None, "met a new kind of arguments inside torch.compile")
        else:
            return _run_new(module, state, values, context)
    if variant.run is not None:
        return variant.run(module, *leaves, context)
    return _run_scoped(module, state, values, context)


def _run_new(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    with TraceSession(state.layers) as session:
        prepare(module, values, session)
    return dispatch(module, values, context)


def _run_scoped(module: nn.Module, state: ContainerState, values: Any, context: Any) -> Any:
    outer = state.scope.enter(context)
    try:
        return own_forward(module, values)
    finally:
        state.scope.leave(outer)


def _resolve(state: ContainerState, leaves: list[Any], context: Any) -> Context | None:
    """Return the context of this call, checked where it enters the model."""
    checked = type(context) is Context
    if context is None:
        context = state.scope.lookup()
    elif not checked:
        device = next((leaf.device for leaf in leaves if hasattr(leaf, "device")), None)
        context = state.scope.resolve(context, device)
    if context is not None and not checked and state.fqn == "":
        _check_length(state, leaves, context)
    return context


def _check_length(state: ContainerState, leaves: list[Any], context: Context) -> None:
    given = context.labels.shape[0]
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not sizes or (given == 1 and context.unknown is False):
        return
    if not any(given == size for size in sizes) and given != len(sizes):
        raise wrong_length(sizes[0], given, state.first_norm)


def own_forward(module: nn.Module, values: tuple[Any, ...]) -> Any:
    """Run the forward the module had before conversion."""
    state: ContainerState = module._normswap  # type: ignore[assignment]
    cls: Any = type(module)
    if state.override is not None:
        return cls.spread(
            lambda _, *args, **kwargs: state.override(*args, **kwargs), module, values
        )
    return cls.spread(cls.converted_from.forward, module, values)


def prepare(module: nn.Module, values: tuple[Any, ...], session: TraceSession) -> Variant:
    """Trace a container for arguments like these and the mode it is in; keep the result."""
    state: ContainerState = module._normswap  # type: ignore[assignment]
    key = tuple([describe(value, [], False) for value in values])
    variant, exact = _trace(module, state, key, values, session)
    if exact:
        state.exact.add(key)
        key = tuple([describe(value, [], True) for value in values])
    found = state.variants.setdefault(key, [])
    if sum(map(len, state.variants.values())) >= _MOST_VARIANTS:
        variant = Variant(None, f"met more than {_MOST_VARIANTS} kinds of arguments or settings")
        found.clear()
    found.append(variant)
    return variant


def _trace(
    module: nn.Module, state: ContainerState, key: Any, values: Any, session: TraceSession
) -> tuple[Variant, bool]:
    cls: Any = type(module)
    if state.override is not None:
        return Variant(None, "its forward was replaced on the instance"), False
    other = next((o for o in map(find_other, key) if o), None)
    if other is not None:
        return Variant(None, f"takes a {other}, which no graph takes"), False
    exact_key = tuple([describe(value, [], True) for value in values])
    attempts = [(key, False), (exact_key, False), (exact_key, True)]
    if exact_key == key:
        del attempts[0]
    reason = ""
    for kinds, inline in attempts:
        try:
            traced = session.trace(module, cls.converted_from.forward, cls.spread, kinds, inline)
        except TraceFailure as failure:
            reason = reason or str(failure)
            continue
        return _thread(module, traced), kinds is exact_key and exact_key != key
    return Variant(None, reason), False


def _thread(module: nn.Module, traced: Any) -> Variant:
    """Pass the context to the calls that take it, and compile the graph."""
    graph = traced.graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
        context = graph.placeholder("normswap_context")
    threaded = []
    for node in calls:
        argument = context_argument(module.get_submodule(node.target))
        if argument is not None:
            node.kwargs = {**node.kwargs, argument: context}
            threaded.append(tuple(node.target.split(".")))
    return Variant(
        run=_compile(graph, f"{type(module).__module__}.{type(module).__qualname__}"),
        reads=tuple(
            (tuple(path.split(".")) if path else (), name, value)
            for (path, name), value in traced.reads.items()
        ),
        structure=tuple((tuple(p.split(".")), c) for p, c in traced.structure.items()),
        calls=tuple(dict.fromkeys(node.target for node in calls)),
        threaded=tuple(dict.fromkeys(threaded)),
        direct=tuple(node.target for node in graph.nodes if node.op == "get_attr"),
    )


def _compile(graph: Any, name: str) -> Callable[..., Any]:
    code = graph.python_code("self")
    count = sum(1 for key in linecache.cache if key.startswith("<normswap "))
    filename = f"<normswap {count} {name}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(True), filename)
    scope: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, filename, "exec"), scope)
    run: Callable[..., Any] = scope["forward"]
    return run


def install(module: nn.Module, state: ContainerState) -> None:
    """Make a module a converted container: same object, a subclass of its class."""
    base = type(module)
    if "forward" in vars(module):
        state.override = vars(module).pop("forward")
    module.__dict__["_normswap"] = state
    module.__class__ = converted_class(base, state.override is not None)


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    cls: Any = type(module)
    state: ContainerState = module.__dict__.pop("_normswap")
    if state.override is not None:
        module.__dict__["forward"] = state.override
    module.__class__ = cls.converted_from


def _restore(make: Callable[..., Any], args: tuple[Any, ...], generic: bool) -> nn.Module:
    module: nn.Module = make(*args)
    module.__class__ = converted_class(type(module), generic)
    return module


def prepare_default(module: nn.Module, session: TraceSession) -> None:
    """Trace for tensors where an argument is required, for the default where it is not.

    Both modes are traced where the forward depends on the mode.
    """
    cls: Any = type(module)
    values = cls.example_values()
    state: ContainerState = module._normswap  # type: ignore[assignment]
    state.variants = {key: found for key, found in state.variants.items() if found}
    met = set(state.variants)
    variant = prepare(module, values, session)
    flips = [path for path, name, _ in variant.reads if name == "training"]
    for path in flips:
        child = _walk(module, path)
        child.__dict__["training"] = not child.training
    try:
        if flips:
            prepare(module, values, session)
    finally:
        for path in flips:
            child = _walk(module, path)
            child.__dict__["training"] = not child.training
    state.assumed = set(state.variants) - met


@functools.cache
def converted_class(base: Any, generic: bool = False) -> Any:
    """Return the subclass of a module class whose forward takes a context.

    Args:
        base: the class.
        generic: whether the forward takes any arguments, since it was replaced on an instance.
    """
    written = write_forward(parameters_of(None if generic else base.forward), dispatch)
    for name in ("__doc__", "__annotations__"):
        if not generic and hasattr(base.forward, name):
            setattr(written.forward, name, getattr(base.forward, name))

    def reduce(self: nn.Module, protocol: Any) -> Any:
        make, args, *rest = base.__reduce_ex__(self, protocol)
        args = tuple(base if arg is type(self) else arg for arg in args)
        return (_restore, (make, args, generic), *rest)

    def set_state(self: nn.Module, values: dict[str, Any]) -> None:
        base.__setstate__(self, values)
        state: ContainerState = self._normswap  # type: ignore[assignment]
        if any(not found for found in state.variants.values()):
            with TraceSession(state.layers) as session:
                prepare_default(self, session)

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "__setstate__": set_state,
        "forward": written.forward,
        "spread": staticmethod(written.spread),
        "example_values": staticmethod(written.examples),
        "converted_from": base,
        "context_argument": written.argument,
    }
    return type(base)(base.__name__, (base,), body)
