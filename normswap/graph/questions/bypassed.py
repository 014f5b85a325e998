"""What forwards take from a norm past its output: code that does so meets one row a context."""

import dis
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

from normswap.errors import ConversionError
from normswap.graph.code.bytecode import codes_of, steps_of
from normswap.graph.questions.class_questions import reachable
from normswap.util.original_class import CALL, ORIGINAL, class_of, switches_of

_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_CONST")
_LOOKS_UP = ("LOAD_ATTR", "LOAD_METHOD")
_ON_TENSORS = (*_LOOKS_UP, "STORE_ATTR")
# What a layer answers as the norm did.
_SETTINGS = {"affine", "eps", "momentum", "num_features", "track_running_stats", "training"}
_SAME = {"forward", "_call_impl", "_check_input_dim", *_SETTINGS}
# Of a tensor that has more rows.
_KEPT = {"device", "dtype", "is_cuda", "requires_grad", "requires_grad_"}
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_ROWS = {*_TENSORS, "num_batches_tracked", "state_dict", "parameters", "named_parameters"}
_ROWS |= {"buffers", "named_buffers", "_parameters", "_buffers", "extra_repr"}


def find_bypassed(model: nn.Module) -> list[str]:
    """Return the names of what forwards, by their code, take from replaced norms.

    So does what a model folds into its weights as it is switched to eval mode.
    """
    found: dict[str, None] = {}
    read: dict[type, list[tuple[str, types.CodeType, list[dis.Instruction]]]] = {}
    for module in model.modules():
        cls: Any = class_of(module)
        if ORIGINAL in vars(module):
            continue
        if cls not in read:
            methods = ("forward", *switches_of(cls))
            codes = (
                (m, c) for m in methods for f in reachable(cls, m) for c in codes_of(f.__code__)
            )
            read[cls] = [(method, code, steps_of(code)) for method, code in codes]
        for method, code, steps in read[cls]:
            variables = {name: module for name in code.co_varnames[: code.co_argcount][:1]}
            taken = _read(steps, {"self": module, **variables})
            # A switch of modes may call any method of a norm.
            kept = (n for n in taken if method == "forward" or n.endswith(_TENSORS))
            found.update(dict.fromkeys(kept))
    return list(found)


def advise_leaving_out(model: nn.Module) -> str:
    """Return what to say of forwards that take tensors of replaced norms; "" where none does."""
    found = [name for name in find_bypassed(model) if name.rpartition(".")[2] in _ROWS]
    if not found:
        return ""
    return (
        f"forwards take {', '.join(found[:6])} past the norm, where each context has a row now, "
        f"and compute something else of it, for all samples; {leave_out(found)}"
    )


def explain(error: BaseException, where: str) -> ConversionError | None:
    """Return the error of a forward whose code takes what a replaced norm no longer has so.

    Args:
        error: what it raised.
        where: name of its module.

    Returns:
        None where another cause is as likely: a child raised, or no norm is read; and for what
        checkpointing raises to end a recomputation, which it catches itself.
    """
    if type(error).__module__ == "torch.utils.checkpoint":
        return None
    trace = error.__traceback__
    found: dict[str, None] = {}
    while trace is not None and trace.tb_frame.f_code is not CALL:
        frame = trace.tb_frame
        steps = steps_of(frame.f_code)
        found.update(dict.fromkeys(_read(steps, frame.f_globals | frame.f_locals)))
        trace = trace.tb_next
    if trace is not None or not found:
        return None
    return ConversionError(
        f"expected the forward of {where or 'the model'} to call its norms, got code that takes "
        f"{', '.join(found)}, not as it was before conversion, and fails "
        f"({type(error).__name__}: {error}); {leave_out(list(found))}"
    )


def leave_out(found: list[str]) -> str:
    """Say how to leave out the norms of what was found."""
    norms = sorted({name.rpartition(".")[0] for name in found})
    return f"leave the norm out with exclude={(norms[0] if len(norms) == 1 else norms)!r}"


def _read(steps: list[dis.Instruction], names: dict[str, Any]) -> Iterator[str]:
    """Yield what code looks up on replaced norms; `names` are its variables, where known."""
    value: Any = None
    indexed: Any = None
    named = False
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        kind, name = step.opname, step.argval
        index = kind == "BINARY_SUBSCR" or step.argrepr == "[]"
        if named and (kind.startswith("CALL") or index):  # getattr(x, "name"), or x["name"]
            named = False
            continue
        named = kind == "LOAD_CONST" and isinstance(value, nn.Module) and isinstance(name, str)
        named = named and (hasattr(value, name) or ORIGINAL in vars(value))
        if kind in _LOOKS_UP or named:
            if ORIGINAL in getattr(value, "__dict__", ()):
                kept = after is not None and after.opname in _ON_TENSORS and after.argval in _KEPT
                if not (kept or name in _SAME or name.startswith("__")):
                    yield f"{vars(value)[ORIGINAL].site.fqn}.{name}"
            value = value._modules.get(name) if isinstance(value, nn.Module) else None
        elif kind.startswith(_LOADS):
            indexed, value = value, None if kind == "LOAD_CONST" else names.get(name)
        elif index:  # which of them may be known when it runs
            parts = indexed.children() if isinstance(indexed, nn.Module) else ()
            value = next((part for part in parts if ORIGINAL in vars(part)), None)
        else:
            if kind == "STORE_FAST":
                names[name] = value
            value = None
