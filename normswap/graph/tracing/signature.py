"""Write a forward with the signature of another plus a context argument."""

import inspect
from collections.abc import Callable, Sequence
from inspect import Parameter
from typing import Any, NamedTuple

import torch

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
# Stands for a required argument until a real one is seen: most are tensors.
EXAMPLE = torch.empty(0)


class Forward(NamedTuple):
    """What `write_forward` makes.

    Attributes:
        forward: takes the original's arguments and the context, and hands
            ``(module, values, context)`` to a dispatcher, with one value per parameter.
        bind: takes the same, and returns the values.
        spread: ``spread(function, module, values)`` calls a function of the original signature.
        examples: returns values of the kind expected: a tensor where the original requires an
            argument, else its default.
        argument: name of the context argument, None where there is none.
    """

    forward: Callable[..., Any]
    bind: Callable[..., Any]
    spread: Callable[..., Any]
    examples: Callable[[], tuple[Any, ...]]
    argument: str | None


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters of an unbound method after self; ``*args, **kwargs`` if unknown.

    Of a decorated one they are the decorator's, which may tell what was given from what was not.
    """
    return _parameters(function, False)


def declared_parameters(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters that a decorated method shows to `inspect`, after self."""
    return _parameters(function, True)


def _parameters(function: Callable[..., Any], follow_wrapped: bool) -> list[Parameter]:
    try:
        signature = inspect.signature(function, follow_wrapped=follow_wrapped)
        parameters = list(signature.parameters.values())
    except (TypeError, ValueError):
        parameters = []
    if parameters and parameters[0].kind in (
        Parameter.POSITIONAL_ONLY,
        Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return parameters[1:]
    return any_parameters()


def any_parameters() -> list[Parameter]:
    """Return the parameters ``*args, **kwargs``."""
    return [
        Parameter("args", Parameter.VAR_POSITIONAL),
        Parameter("kwargs", Parameter.VAR_KEYWORD),
    ]


def write_forward(
    parameters: list[Parameter],
    dispatch: Callable[..., Any],
    contextual: bool = True,
    declared: Sequence[Parameter] = (),
) -> Forward:
    """Write the functions of `Forward` for these parameters.

    The context argument is the last that may be given by position, or by keyword only after
    ``*args``. It is called ``context``, or ``norm_context`` where the original has a ``context``.
    `declared` are the parameters a decorated forward shows.
    """
    taken = {p.name for p in (*parameters, *declared)}
    argument = "norm_context" if "context" in taken else "context"
    scope: dict[str, Any] = {"_dispatch": dispatch}
    head: list[str] = ["self"]
    passed: list[str] = []
    written = False

    def write_context() -> None:
        nonlocal written
        if contextual and not written:
            head.append(f"{argument}=None")
            written = True

    for index, parameter in enumerate(parameters):
        name, kind = parameter.name, parameter.kind
        default = ""
        if parameter.default is not Parameter.empty:
            scope[f"_default_{index}"] = parameter.default
            default = f"=_default_{index}"
        if kind is Parameter.VAR_POSITIONAL:
            head.append(f"*{name}")
            write_context()
            passed.append(f"*{name}")
        elif kind is Parameter.KEYWORD_ONLY:
            if not any(h.startswith("*") for h in head):
                write_context()
                head.append("*")
            head.append(f"{name}{default}")
            passed.append(f"{name}={name}")
        elif kind is Parameter.VAR_KEYWORD:
            write_context()
            head.append(f"**{name}")
            passed.append(f"**{name}")
        else:
            head.append(f"{name}{default}")
            passed.append(name)
            following = parameters[index + 1].kind if index + 1 < len(parameters) else None
            if kind is Parameter.POSITIONAL_ONLY and following is not kind:
                head.append("/")
    write_context()
    names = "".join(f"{p.name}, " for p in parameters)
    unpack = f"    {names}= values\n" if names else ""
    source = (
        f"def forward({', '.join(head)}):\n"
        f"    return _dispatch(self, ({names}), {argument if contextual else None})\n"
        f"def bind({', '.join(head)}):\n"
        f"    return ({names})\n"
        f"def spread(function, self, values):\n"
        f"{unpack}"
        f"    return function({', '.join(['self', *passed])})\n"
    )
    exec(compile(source, "<normswap forward>", "exec"), scope)

    shown = [p for p in declared if p.name not in {q.name for q in parameters}]
    if shown:
        scope["forward"].__signature__ = _show(parameters, shown, argument if contextual else None)
    required = tuple(EXAMPLE for p in shown if p.default is p.empty and p.kind in _POSITIONAL)

    def examples() -> tuple[Any, ...]:
        return tuple(_example(p, required) for p in parameters)

    context = argument if contextual else None
    return Forward(scope["forward"], scope["bind"], scope["spread"], examples, context)


def _show(own: list[Parameter], shown: list[Parameter], argument: str | None) -> inspect.Signature:
    """Return the signature a decorated forward shows, the context added."""
    first = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in own if p.kind in _POSITIONAL]
    rest = [p for p in shown if p.kind is not Parameter.VAR_KEYWORD]
    context = [Parameter(argument, Parameter.KEYWORD_ONLY, default=None)] if argument else []
    last = [p for p in shown if p.kind is Parameter.VAR_KEYWORD]
    order = sorted([first, *named, *rest], key=lambda p: p.kind)
    return inspect.Signature([*order, *context, *last])


def _example(parameter: Parameter, required: tuple[Any, ...]) -> Any:
    if parameter.kind is Parameter.VAR_POSITIONAL:
        return required
    if parameter.kind is Parameter.VAR_KEYWORD:
        return {}
    return EXAMPLE if parameter.default is Parameter.empty else parameter.default
