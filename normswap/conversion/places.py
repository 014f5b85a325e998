"""Where a method could insert its layers, and what chose or refused each place."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _forward_unimplemented

from normswap.conversion.settings import Settings
from normswap.errors import ConversionError
from normswap.graph.blocks.channels import LAST, Reader
from normswap.graph.blocks.insert import PLACEMENTS
from normswap.graph.blocks.residual import Residual, features_of, find_residuals, input_channels
from normswap.graph.dispatch import dispatch
from normswap.graph.tracing import (
    Traced,
    TraceFailure,
    TraceSession,
    describe,
    flipped,
    parameters_of,
    write_forward,
)
from normswap.methods.base import InsertedMethod
from normswap.report import Row
from normswap.sites import Place, find_norms, is_instance_norm, norm_channels, unknown_norm
from normswap.util.arguments import meant
from normswap.util.select import Selector, closest, why_kept

ALL_PLACEMENTS = ("norm", "output", *PLACEMENTS, "input")


class Found(NamedTuple):
    """A norm, or a container that is or may be a residual block.

    Attributes:
        module: the norm or container.
        row: for the report.
        place: of the layer; None where there is to be none.
        read: whether a graph told what the container holds; else it may be no block at all.
    """

    module: nn.Module
    row: Row
    place: Place | None = None
    read: bool = True


def _row(fqn: str, module: nn.Module, reason: str, aliases: tuple[str, ...] = ()) -> Row:
    return Row(fqn, type(module).__name__, "refused", aliases, reason=reason)


def find_places(
    model: nn.Module, method: InsertedMethod, asked: Settings
) -> tuple[list[Row], list[Place]]:
    """Return a row for every place a method's layers could go, and the places chosen.

    The placement None is the method's own in a model that has such places, else "norm". Selectors
    are matched against the container of a block, or the norm.

    Raises:
        ConversionError: an unknown placement, "output" without `select`, or no place at all.
    """
    select, own = asked.select, asked.placement or method.placement
    find = functools.cache(functools.partial(_find, model, select, asked.exclude))
    if asked.placement is None and not any(f.read and f.row.action != "kept" for f in find(own)):
        own = "norm"
    rows: list[Row] = []
    places: list[Place] = []
    for wanted in method.placements(own, asked.options):
        title = f"placement {wanted!r}" + ("" if wanted == own else f", an option of {method.name}")
        if wanted not in ALL_PLACEMENTS:
            raise ConversionError(
                f"unknown {title}; the choices are {', '.join(ALL_PLACEMENTS)}"
                + meant(wanted, ALL_PLACEMENTS)
            )
        if wanted == "output" and select is None:
            raise ConversionError(
                f"expected select= with {title}, which is after the modules that it names, such as "
                'select=["layer1", "layer2"]'
            )
        found = find(wanted)
        chosen = [f.place for f in found if f.row.action == "inserted" and f.place is not None]
        if not chosen:
            listed = "; ".join(f"{f.row.fqn or '(root)'}: {f.row.reason}" for f in found[:10])
            raise ConversionError(
                f"found no place for a layer in {type(model).__name__} at {title}"
                + (f": {listed}" if listed else "")
                + "; placement='norm' puts one after each norm" * (wanted not in ("norm", "output"))
                + closest(select, [f.row.fqn for f in found if f.row.reason == "not selected"])
            )
        rows += [f.row for f in found]
        places += chosen
    return rows, places


def place_at_input(model: nn.Module) -> tuple[Row, Place]:
    """Return the place before a model, and a row for it."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    place = Place("", "input", input_channels(model), like.device, like.dtype)
    return Row("", "the first argument", "inserted"), place


def _find(model: nn.Module, select: Selector, exclude: Selector, placement: str) -> list[Found]:
    if placement == "input":
        return [Found(model, *place_at_input(model))]
    finder = {"norm": _norm_places, "output": _outputs}.get(placement, _block_places)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    found = list(finder(model, placement, like))
    for module, row, place, _ in found:
        names = (row.fqn, *row.aliases)
        if why := why_kept(select, exclude, names, module):
            row.action, row.reason = "kept", why
        elif place is not None:
            row.action = "inserted"
            row.channels = place.channels or 0
    if placement == "output":  # any module could be one
        return [f for f in found if f.row.reason != "not selected"]
    return found


def _norm_places(model: nn.Module, placement: str, like: Tensor) -> Iterator[Found]:
    for fqn, module, aliases in find_norms(model):
        channels, before = norm_channels(module), is_instance_norm(module)
        place, reason = None, "before the norm" if before else "after the norm"
        if channels is None:
            reason = unknown_norm(module)
        else:
            own = next((t for t in module.state_dict().values() if t.is_floating_point()), like)
            place = Place(fqn, placement, channels, own.device, own.dtype, before=before)
        yield Found(module, _row(fqn, module, reason, aliases), place)


def _outputs(model: nn.Module, placement: str, like: Tensor) -> Iterator[Found]:
    for fqn, module in model.named_modules():
        if type(module).forward is _forward_unimplemented and "forward" not in vars(module):
            if fqn:
                reason = "it has no forward after which a layer could come"
                yield Found(module, _row(fqn, module, reason))
        elif fqn:
            place = Place(fqn, placement, None, like.device, like.dtype)
            yield Found(module, _row(fqn, module, "after its forward"), place)


def _block_places(model: nn.Module, placement: str, like: Tensor) -> Iterator[Found]:
    with TraceSession() as session:
        read = functools.cache(functools.partial(read_container, session))

        def graph_of(module: nn.Module) -> fx.Graph | None:
            traced, _ = read(module)
            return None if traced is None else traced.graph

        for fqn, module in model.named_modules():
            if not any(module.children()):
                continue
            traced, why = read(module)
            found: list[Residual] = []
            unclear: list[str] = []
            if traced is not None:
                found, unclear = find_residuals(traced.graph, module)
                with flipped(module, traced.guards) as depends:
                    if found and depends:
                        _, why = read_container(session, module)
            if why:
                yield Found(module, _row(fqn, module, f"it {why}"), read=False)
                continue
            yield from (Found(module, _row(fqn, module, reason)) for reason in unclear)
            reader = Reader(module, graph_of)
            for block, residual in enumerate(found):
                reason = residual.reason
                features = features_of(residual, reader, placement)
                channels = features.channels if features.dimension != LAST else None
                why = "its features have their channels last"
                if not features.known:
                    channels, why = None, "nothing tells the channels of its features"
                if channels is None:
                    yield Found(module, _row(fqn, module, f"{why} ({reason})"))
                    continue
                where = (fqn, placement, channels, like.device, like.dtype)
                place = Place(*where, block, len(found), reason=reason)
                yield Found(module, _row(fqn, module, reason), place)


def read_container(session: TraceSession, module: nn.Module) -> tuple[Traced | None, str]:
    """Trace a module in the mode it is in; return the graph, or why there is none."""
    forward = type(module).forward
    if type(module).__module__.startswith("torch.nn.") or forward is _forward_unimplemented:
        return None, ""
    written = write_forward(parameters_of(forward), dispatch)
    kinds = tuple(describe(value, []) for value in written.examples())
    try:
        return session.trace(module, written.spread, kinds), ""
    except TraceFailure as failure:
        return None, str(failure)
