"""Write a forward with the signature of another plus a context argument."""

import inspect
import types
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

import torch
from torch import nn

from normswap.graph.code.bytecode import codes_of
from normswap.graph.code.library import is_torch
from normswap.util.original_class import container_class

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
# How a value of a parameter of each kind is passed on.
_PASSED = ("{}", "{}", "*{}", "{0}={0}", "**{}")
# Stands for a required argument until a real one is seen: most are tensors.
EXAMPLE = torch.empty(0)


class ForwardFunctions(NamedTuple):
    """What `write_forward` makes.

    Attributes:
        forward: takes the original's arguments and the context, and hands
            ``(module, values, context)`` to a dispatcher, with one value per parameter.
        bind: takes the same, and returns the values.
        spread: ``spread(function, module, values)`` calls a function of the original signature.
        examples: returns values of the kind expected: a tensor where the original requires an
            argument, else its default.
    """

    forward: Callable[..., Any]
    bind: Callable[..., Any]
    spread: Callable[..., Any]
    examples: Callable[[], tuple[Any, ...]]


def parameters_of(function: Callable[..., Any], follow_wrapped: bool = False) -> list[Parameter]:
    """Return the parameters of an unbound method after self; ``*args, **kwargs`` if unknown.

    Of a decorated one they are the decorator's, which may tell what was given from what was not,
    or with `follow_wrapped` those that it shows to `inspect`: a ``__signature__``, whatever it
    takes.
    """
    if not follow_wrapped and isinstance(function, types.FunctionType):
        own = function
        parts = own.__code__, own.__globals__, None, own.__defaults__, own.__closure__
        function = types.FunctionType(*parts)
        function.__kwdefaults__ = own.__kwdefaults__
    try:
        signature = inspect.signature(function, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return any_parameters()
    parameters = list(signature.parameters.values())
    bound = parameters and parameters[0].kind in _POSITIONAL
    return parameters[1:] if bound else any_parameters()


def any_parameters() -> list[Parameter]:
    """Return the parameters ``*args, **kwargs``."""
    kinds = {"args": Parameter.VAR_POSITIONAL, "kwargs": Parameter.VAR_KEYWORD}
    return [Parameter(name, kind) for name, kind in kinds.items()]


def free_argument(module: nn.Module, override: Callable[..., Any] | None = None) -> str:
    """Return the name of a container's context argument: ``context``, if that is free.

    It is ``norm_context`` where the forward or ``__call__`` has a parameter of that name, and where
    either takes any keyword and code of the module, or of one below, uses the name.

    Args:
        module: the container, its class its own still.
        override: the forward that was set on the instance, if any.
    """
    cls = type(module)
    called = [] if cls.__call__ is nn.Module.__call__ else [cls.__call__]
    own = [getattr(f, "__func__", f) for f in (override or cls.forward, *called)]
    parameters = [p for f in own for p in (*parameters_of(f), *parameters_of(f, True))]
    taken = {p.name for p in parameters}
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        classes = {container_class(m) for m in module.modules()}
        outside = [cls for cls in classes if not hasattr(cls, "_normswap_argument")]
        bases = {base for cls in outside for base in cls.__mro__ if not is_torch(base.__module__)}
        functions = [f for base in bases for f in vars(base).values()]
        taken = taken.union(*map(_names, (*own, *functions)))
    name = "context"
    while name in taken:
        name = f"norm_{name}"
    return name


def _names(function: Any) -> set[str]:
    """Return the names of a function's parameters and the strings it contains, nested ones too."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    names: set[str] = set()
    for part in codes_of(code) if isinstance(code, types.CodeType) else ():
        names.update(part.co_varnames[: part.co_argcount + part.co_kwonlyargcount])
        names.update(c for c in part.co_consts if isinstance(c, str))
    return names


class _Written:
    """A default in a signature that is written as code."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def write_forward(
    parameters: list[Parameter],
    dispatch: Callable[..., Any],
    argument: str | None = None,
    declared: Sequence[Parameter] = (),
) -> ForwardFunctions:
    """Write the functions of `ForwardFunctions` for these parameters.

    The context argument, of the name `argument` if there is to be one, is the last that may be
    given by position, or by keyword only after ``*args``. `declared` are the parameters a
    decorated forward shows.
    """
    scope: dict[str, Any] = {"_normswap_dispatch": dispatch}
    head = [Parameter("self", min([_POSITIONAL[1], *(p.kind for p in parameters)]))]
    for p in parameters:
        head.append(p.replace(annotation=p.empty))
        if p.default is not p.empty:
            scope[f"_default_{p.name}"] = p.default
            head[-1] = head[-1].replace(default=_Written(f"_default_{p.name}"))
    if argument is not None:
        starred = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        kind = Parameter.KEYWORD_ONLY if starred else Parameter.POSITIONAL_OR_KEYWORD
        place = sum(p.kind <= Parameter.VAR_POSITIONAL for p in head)
        head.insert(place, Parameter(argument, kind, default=None))
    names = "".join(f"{p.name}, " for p in parameters)
    passed = ", ".join(["self", *(_PASSED[p.kind].format(p.name) for p in parameters)])
    source = (
        f"def forward{inspect.Signature(head)}:\n"
        f"    return _normswap_dispatch(self, ({names}), {argument})\n"
        f"def bind{inspect.Signature(head)}:\n"
        f"    return ({names})\n"
        "def spread(_normswap_function, self, _normswap_values):\n"
        f"    {names or '()'} = _normswap_values\n"
        f"    return _normswap_function({passed})\n"
    )
    exec(compile(source, "<normswap forward>", "exec"), scope)

    shown = [p for p in declared if p.name not in {q.name for q in parameters}]
    if shown:
        scope["forward"].__signature__ = _show(parameters, shown, argument)
    required = tuple(EXAMPLE for p in shown if p.default is p.empty and p.kind in _POSITIONAL)

    def examples() -> tuple[Any, ...]:
        given = [_example(p, required) for p in parameters]
        if given and given[0] is None:  # forwards of transformers may do without their input
            given[0] = EXAMPLE
        return tuple(given)

    return ForwardFunctions(scope["forward"], scope["bind"], scope["spread"], examples)


def _show(own: list[Parameter], shown: list[Parameter], argument: str | None) -> inspect.Signature:
    """Return the signature a decorated forward shows, the context added."""
    first = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    context = [Parameter(argument, Parameter.KEYWORD_ONLY, default=None)] if argument else []
    named = [p for p in own if p.kind in _POSITIONAL]
    return inspect.Signature(sorted([first, *named, *shown, *context], key=lambda p: p.kind))


def _example(parameter: Parameter, required: tuple[Any, ...]) -> Any:
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return required
    if parameter.kind is Parameter.VAR_KEYWORD:
        return {}
    return EXAMPLE if parameter.default is Parameter.empty else parameter.default
