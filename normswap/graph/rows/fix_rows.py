"""Declare what measuring rows cannot tell: an order that never changes, or that there is none."""

from torch import nn

from normswap.errors import expect_module, not_converted
from normswap.graph.scope.scope import scope_of


def fix_rows(model: nn.Module, fixed: bool = True, aligned: bool = False) -> None:
    """Declare that the order in which samples reach the norms is the same in every call.

    A forward that flips or permutes its samples has the order measured in each call, which costs
    several forwards, since another call may have another. Declared fixed, it is measured once for
    each batch size and kind of call, and compiled programs can use it.

    Orders are measured in calls that are not compiled. Compiled code takes a norm that it gives
    one row a sample, and of which nothing was measured in its mode, to be in the order of the
    batch: where a forward reorders, run one mixed batch of each mode before compiling it.

    In a network of graphs a row is a node, and messages make each depend on several: no measurement
    tells whose it is. Declared aligned, row i of every norm is that of label i, whatever it is
    computed from, and nothing is measured; for labels of whole graphs give ``labels[batch]``.

    Args:
        model: a converted model, or a module that holds one.
        fixed: False takes it back.
        aligned: row i of every norm is of sample i; norms with another number of rows are then an
            error. False takes it back.

    Raises:
        ConversionError: no converted model in `model`.
    """
    expect_module(model)
    found = {id(s): s.rows for m in model.modules() if (s := scope_of(m)) is not None}
    if not found:
        raise not_converted(model, " with a method that takes labels")
    for rows in found.values():
        rows.fixed, rows.aligned = fixed, aligned
        rows.families.clear()
