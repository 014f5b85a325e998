"""What a conversion does to a model: decided before anything changes, then done."""

from typing import Any, TypeAlias

from torch import nn

from normswap.conversion.insertion import InputNorm, Insertion
from normswap.conversion.places import find_places, place_at_input
from normswap.conversion.replacement import Bare, Replacement, find_replacement
from normswap.conversion.select import Selector
from normswap.errors import ConversionError
from normswap.graph.class_questions import check_questions
from normswap.graph.surgery import Surgery
from normswap.lifecycle.record import Record
from normswap.methods.base import BaseMethod, InsertedMethod, Method

Target: TypeAlias = Replacement | Insertion | InputNorm | Bare


def find_target(
    model: nn.Module,
    method: BaseMethod,
    options: Any,
    placement: str | None,
    select: Selector,
    exclude: Selector,
) -> Target:
    """Return what is to be changed, with a row for everything that was considered.

    Raises:
        ConversionError: a placement that the method does not have, or nothing to change.
    """
    if isinstance(method, InsertedMethod):
        rows, places = find_places(model, method, placement, options, select, exclude)
        return Insertion(method, rows, places)
    assert isinstance(method, Method)
    if placement == "input":
        row, place = place_at_input(model)
        return InputNorm(method, [row], place)
    if placement is not None:
        raise ConversionError(
            f"method {method.name!r} replaces norms where they are; expected placement=None, or "
            f"'input' for one before the model, got {placement!r}"
        )
    return find_replacement(model, method, select, exclude)


def carry_out(target: Target, surgery: Surgery, record: Record) -> nn.Module:
    """Change the model under surgery; return the converted one, a layer where it was a norm.

    Raises:
        ConversionError: a layer cannot be built or reached, or code that asks for a class would
            be answered otherwise than before.
    """
    converted = target.apply(surgery, record)
    check_questions(converted)
    return converted
