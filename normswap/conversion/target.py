"""What a conversion does to a model: decided before anything changes, then done."""

import functools
import glob
from dataclasses import replace
from typing import TypeAlias

from torch import nn
from torch.nn.modules.module import _forward_unimplemented

from normswap.conversion.insertion import InputNorm, Insertion
from normswap.conversion.places import find_places, place_at_input, read_container
from normswap.conversion.replacement import Bare, Replacement, find_replacement
from normswap.conversion.settings import Settings
from normswap.errors import ConversionError
from normswap.graph.questions.class_answers import check_questions
from normswap.graph.surgery import Surgery
from normswap.graph.tracing import TraceSession
from normswap.lifecycle.record import Record
from normswap.methods.base import BaseMethod, InsertedMethod, Method
from normswap.sites import find_norms, norm_channels, read_site
from normswap.util.select import FIRST, Selector, check_meant, matches

Target: TypeAlias = Replacement | Insertion | InputNorm | Bare


def find_target(model: nn.Module, asked: Settings) -> Target:
    """Return what is to be changed, with a row for everything that was considered.

    Raises:
        ConversionError: a placement that the method does not have, nothing to change, or a name
            or pattern that matches nothing.
    """
    method, placement = asked.method, asked.placement
    if asked.select == FIRST:
        name, how = _first(model, method, asked.exclude)
        first = find_target(model, replace(asked, select=glob.escape(name)))
        for row in first.rows:
            if row.fqn == name:
                row.reason = how
        return first
    target: Target
    if isinstance(method, InsertedMethod):
        target = Insertion(method, *find_places(model, method, asked))
    else:
        assert isinstance(method, Method)
        if placement == "input":
            row, place = place_at_input(model)
            return InputNorm(method, [row], [place])
        if placement is not None:
            raise ConversionError(
                f"method {method.name!r} replaces norms where they are; expected placement=None, "
                f"or 'input' for one before the model, got {placement!r}"
            )
        target = find_replacement(model, method, asked.select, asked.exclude)
    names = [name for row in target.rows for name in (row.fqn, *row.aliases)]
    check_meant("select", asked.select, names)
    check_meant("exclude", asked.exclude, names)
    return target


def _first(model: nn.Module, method: BaseMethod, exclude: Selector) -> tuple[str, str]:
    """Return the name of the first norm that a method can change, and how it is known."""
    if any(name == FIRST for name, _ in model.named_modules()):
        raise ConversionError(
            f"a module is called {FIRST!r}, which also means the first norm that a forward meets; "
            f"expected select=[{FIRST!r}] for the module, or the name of the norm"
        )
    norms = {}
    for fqn, module, aliases in find_norms(model):
        site = read_site(fqn, module, aliases)
        fits = norm_channels(module) is not None
        if isinstance(method, Method):
            fits = not isinstance(site, str) and method.refuse(site) is None
        if fits and (exclude is None or not matches(exclude, (fqn, *aliases), module)):
            norms[fqn] = module
    if not norms:
        raise ConversionError(
            f"found no norm in {type(model).__name__} that method {method.name!r} can change; "
            "normswap.plan without select= says why of each"
        )
    return find_first(model, norms)


def find_first(model: nn.Module, norms: dict[str, nn.Module]) -> tuple[str, str]:
    """Return which of some norms a forward of the model meets first, and how that is known."""
    holders = {name.rsplit(".", depth)[0] for name in norms for depth in range(name.count(".") + 1)}
    assumed: list[str] = []

    def meet(name: str, module: nn.Module) -> str | None:
        if name in norms:
            return name
        if name and name not in holders:
            return None
        traced, _ = read(module)
        if traced is None:
            if type(module).forward not in (_forward_unimplemented, nn.Sequential.forward):
                assumed.append(name or type(module).__name__)
            return first(name, module, [child for child, _ in module.named_children()])
        called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
        return first(name, module, called)

    def first(name: str, module: nn.Module, targets: list[str]) -> str | None:
        for target in targets:
            path = f"{name}.{target}" if name else target
            if (found := meet(path, module.get_submodule(target))) is not None:
                return found
        return None

    with TraceSession() as session:
        read = functools.partial(read_container, session)
        found = meet("", model)
    if found is None:
        return next(iter(norms)), "the first in the model; no forward that was read calls one"
    if assumed:
        return found, f"the first in the model; the forward of {assumed[0]} could not be read"
    return found, "the first that a forward meets"


def carry_out(target: Target, surgery: Surgery, record: Record) -> nn.Module:
    """Change the model under surgery; return the converted one, a layer where it was a norm."""
    converted = target.apply(surgery, record)
    check_questions(converted, surgery.release)
    return converted
