"""Which questions of class get no answer, and what stands in their way: an error, or plain code.

A container runs no such question where a graph of calls of its children stands for its forward.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from normswap.errors import ConversionError
from normswap.graph.questions.class_questions import Question, find_questions
from normswap.graph.questions.freezing import learn_freezing
from normswap.graph.rows.quiet import takes_part
from normswap.graph.rows.reached import function_of
from normswap.graph.state import ContainerState
from normswap.util.original_class import ORIGINAL, STATE, class_of, switches_of


def check_questions(model: nn.Module, release: Callable[[list[nn.Module]], None]) -> None:
    """Keep with each container what its forward asks and nothing answers.

    A container whose exact class is asked for may do without a class of its own: the norms below
    find the context in the scope of those above.

    Args:
        model: the converted model.
        release: gives containers the class back that they had.

    Raises:
        ConversionError: a forward asks, and is not traced.
    """
    for cls in set(map(class_of, model.modules())):
        learn_freezing(cls)
    found = list(_find_unanswered(model))
    exact = {question.cls for _, questions in found for question in questions if question.exact}
    parts = [m for m in model.modules() if m is not model and class_of(m) in exact]
    if parts := [m for m in parts if _may_be_released(m)]:
        release(parts)
        found = list(_find_unanswered(model))
    for name, questions in found:
        check_question(name, _message(questions, model))
    _check_modes(model)


def _find_unanswered(model: nn.Module) -> Iterator[tuple[str, list[Question]]]:
    """Yield the names of modules whose forwards ask and are not traced, and what they ask.

    So do hooks, of which those count that return something.
    """
    changed = _changed(model)
    asked: dict[type, tuple[list[Question], list[Question]]] = {}
    for name, module in model.named_modules():
        old = class_of(module)
        if old not in asked:
            found = list(find_questions(module, changed))
            ever = [q for q in found if not q.compiled]
            asked[old] = ever, ever or found
        state: ContainerState | None = vars(module).get(STATE)
        if state is not None:
            ever, compiled = asked[old]
            state.questions = _message(ever, model), _message(compiled, model)
        ways = [] if state is None else state.seen()
        if not ways or any(way.run is None for way in ways):
            # Without a state nothing stands between compiled code and the forward.
            if questions := asked[old][state is None]:
                yield name, questions
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        for hook in filter(takes_part, hooks):
            if (function := function_of(hook)) is not None:
                found = [q for q in find_questions(module, changed, function) if not q.compiled]
                if found:
                    yield name, found


def _changed(model: nn.Module) -> dict[type, type]:
    """Return the class now of each class of a model that conversion changed."""
    return {class_of(m): type(m) for m in model.modules() if class_of(m) is not type(m)}


def _check_modes(model: nn.Module) -> None:
    """Refuse a `train` that finds norms by what nothing answers, and would leave them training.

    Raises:
        ConversionError: there is one.
    """
    changed = _changed(model)
    kinds = {cls: list(switches_of(cls)) for cls in set(map(class_of, model.modules()))}
    switching = [(n, m) for n, m in model.named_modules() if kinds[class_of(m)]]
    for name, module in switching:
        if all(class_of(part) is type(part) for part in module.modules()):
            continue
        for verb in kinds[class_of(module)]:
            asked = find_questions(module, changed, verb)
            if questions := [q for q in asked if not q.compiled]:
                raise ConversionError(
                    f"expected {verb}() of {name or 'the model'} to find norms by isinstance, got "
                    f"one where {_message(questions, model)}"
                )


def _may_be_released(module: nn.Module) -> bool:
    """Return whether a module is a container that got nothing but a class."""
    state = vars(module).get(STATE)
    switches = any(switches_of(class_of(module)))
    return state is not None and not state.children() and not switches


def _message(questions: list[Question], model: nn.Module) -> str:
    return f"{questions[0].text}, {_way_out(questions, model)}" if questions else ""


def _way_out(questions: list[Question], model: nn.Module) -> str:
    """Say which norms to leave out, so that nothing of the classes changes that are asked for."""
    left: dict[str, None] = {}
    for name, module in model.named_modules():
        old = class_of(module)
        asked = [q.cls for q in questions if q.means(old)]
        if not asked or old is type(module) or any(f"'{p}.*'" in left for p in _above(name)):
            continue
        if not name:
            return "which conversion changes: it is the model's own class"
        if ORIGINAL in vars(module):
            left[asked[0].__name__] = None
            continue
        _, *below = module.modules()
        if _has_layers(module):
            left[repr(name)] = None
        if any(ORIGINAL in vars(each) or _has_layers(each) for each in below):
            left[f"'{name}.*'"] = None
    exclude = next(iter(left)) if len(left) == 1 else f"[{', '.join(left)}]"
    return f"which conversion changes; leave norms out with exclude={exclude}"


def _has_layers(module: nn.Module) -> bool:
    """Return whether layers were inserted in a module itself."""
    state = vars(module).get(STATE)
    return state is not None and bool(state.children())


def _above(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module is in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def check_question(name: str, question: str) -> None:
    """Raise where a forward asks for classes in a way that nothing answers.

    Raises:
        ConversionError: it does.
    """
    if question:
        raise ConversionError(
            "expected a forward that asks for classes by isinstance(value, one_class) only, at "
            f"{name or 'the model'}, got one where {question}"
        )


def answered(name: str, questions: tuple[str, str], run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with code of the user's as one that is asked for classes and answers.

    Args:
        name: of its module.
        questions: what the code asks that nothing answers, and that nothing does when compiled.
        run: the function; it stays out of compiled code where that would answer otherwise.

    Raises:
        ConversionError: nothing answers.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    check_question(name, questions[1] if compiling else questions[0])
    if questions[1] and not compiling and "torch._dynamo" in sys.modules:
        alone: Callable[..., Any] = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
        return alone
    return run
