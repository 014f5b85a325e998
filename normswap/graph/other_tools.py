"""What other tools do with a converted container: trace it, script it, fuse its norms."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx, nn

from normswap.errors import ConversionError, refuse_scripting
from normswap.graph.own_forward import own_forward
from normswap.graph.questions.class_answers import answered
from normswap.graph.state import ContainerState, Values, context_argument
from normswap.graph.tracing import symbolic_parts

# Methods by which models fold their batch norms into convolutions: torchvision's, timm's and
# ultralytics' names, where they need no argument.
_FUSING = ("fuse", "fuse_model", "reparameterize", "switch_to_deploy")


def is_symbolic(values: Values) -> bool:
    """Return whether a call is traced by `torch.fx`, not by this package."""
    return not torch.compiler.is_compiling() and bool(symbolic_parts(values))


def run_symbolic(module: nn.Module, state: ContainerState, values: Values, context: object) -> Any:
    """Run a container's own forward under a tracer of `torch.fx`, to which norms are leaves.

    Raises:
        ConversionError: layers are inserted in the container; its own forward knows none of them.
    """
    if state.children() or state.schedule is not None:
        raise ConversionError(
            f"expected {state.fqn or 'the model'} to run, got symbolic values of torch.fx, which "
            "would leave out the layers inserted there; trace normswap.specialize(model), or use "
            "torch.export"
        )
    output = answered(state.fqn, state.questions, own_forward)(module, values)
    if isinstance(context, fx.Proxy):
        root: Any = context.tracer.root  # type: ignore[attr-defined]
        for node in context.node.graph.find_nodes(op="call_module"):
            argument = context_argument(root.get_submodule(node.target))
            if argument and argument not in node.kwargs:
                node.kwargs = {**node.kwargs, argument: context.node}
    return output


def refusals(base: type) -> dict[str, Any]:
    """Return methods for a converted class in place of those that need the norms it had."""
    name = base.__name__
    found: dict[str, Any] = {"__prepare_scriptable__": refuse_scripting}
    if hasattr(base, "from_pretrained"):
        refuse = _refusing(
            f"expected from_pretrained of {name} itself, got that of a converted {name}, which is "
            "made by normswap.convert only; load weights into the original, then convert it, or "
            "use normswap.load for what normswap.save wrote"
        )
        found["from_pretrained"] = classmethod(refuse)
    for verb in (v for v in _FUSING if _needs_nothing(base, v)):
        found[verb] = _refusing(
            f"expected plain norms for {name}.{verb}(), got a converted model; call it on "
            "normswap.specialize(model, context), a plain model for one context"
        )
    return found


def _refusing(message: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise ConversionError(message)

    return refuse


def _needs_nothing(base: type, verb: str) -> bool:
    """Return whether a class has a method of a name that nothing need be given, nor any number."""
    method = getattr(base, verb, None)
    if not callable(method):
        return False
    given = list(inspect.signature(method).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in given)
