"""What `convert` does to a model, step by step; `api` puts the steps in order."""

from typing import Any

from torch import nn

from normswap.conversion.insertion import find_places, insert, insert_at_input, place_at_input
from normswap.conversion.select import Selector, matches
from normswap.errors import ConversionError
from normswap.graph.class_questions import check_questions
from normswap.graph.scope import Scope
from normswap.graph.state import RECORD
from normswap.graph.surgery import Surgery
from normswap.lifecycle.original import remember_original
from normswap.lifecycle.record import Record
from normswap.methods.base import BaseMethod, InsertedMethod, Method
from normswap.report import Row, Verification
from normswap.sites import Place, Site, find_norms, read_site


def _decide(
    model: nn.Module, method: Method, select: Selector, exclude: Selector
) -> tuple[list[Row], list[Site]]:
    """Return a row for every norm, and the sites to replace."""
    rows: list[Row] = []
    chosen: list[Site] = []
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    for fqn, module, aliases in find_norms(model):
        size = sum(p.numel() for p in module.parameters())
        row = Row(fqn, type(module).__name__, "refused", aliases, parameters_before=size)
        row.parameters_after = size
        rows.append(row)
        names = (fqn, *aliases)
        site = read_site(fqn, module, aliases, like)
        if select is not None and not matches(select, names, module):
            row.action, row.reason = "kept", "not selected"
        elif exclude is not None and matches(exclude, names, module):
            row.action, row.reason = "kept", "excluded"
        elif isinstance(site, str):
            row.reason = site
        else:
            row.channels = site.num_features
            row.reason = method.refuse(site) or ""
            if not row.reason:
                row.action = "replaced"
                chosen.append(site)
    if not chosen:
        raise ConversionError(_nothing_to_replace(model, rows))
    return rows, chosen


def _nothing_to_replace(model: nn.Module, rows: list[Row]) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(f"{row.source}: {row.reason}", []).append(row.fqn or "(root)")
    listed = "; ".join(
        f"{len(names)} {why} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for why, names in by_reason.items()
    )
    return f"found no norm to replace in {type(model).__name__}: " + (
        listed or "it has none at all"
    )


def _replace(surgery: Surgery, method: BaseMethod, record: Record, sites: list[Site]) -> None:
    """Swap every chosen norm and thread the context to it."""
    assert isinstance(method, Method)
    scope = Scope(record.contexts.count, record.contexts.names)
    rows = {row.fqn: row for row in record.rows}
    layers = [
        _build(method, site, surgery.model.get_submodule(site.fqn), record, scope, rows[site.fqn])
        for site in sites
    ]
    replaced = {
        id(surgery.model.get_submodule(site.fqn)): layer
        for site, layer in zip(sites, layers, strict=True)
    }
    for site, layer in zip(sites, layers, strict=True):
        surgery.swap((site.fqn, *site.aliases), layer)
    surgery.replace_held(replaced)
    if method.needs_context:
        names = [name for site in sites for name in (site.fqn, *site.aliases)]
        surgery.install(names, scope, tuple({type(layer) for layer in layers}))


def _build(
    method: Method, site: Site, module: nn.Module, record: Record, scope: Scope, row: Row
) -> nn.Module:
    layer = method.build(site, module, record.contexts, record.options)
    remember_original(layer, module, site)
    if method.needs_context:
        layer.scope = scope  # type: ignore[assignment]
    row.target = type(layer).__name__
    row.contexts = record.contexts.count if method.needs_context else 0
    row.parameters_after = sum(p.numel() for p in layer.parameters())
    row.statistics = "transferred" if site.tracked else "of each instance"
    return layer


def convert_bare(model: nn.Module, method: BaseMethod, record: Record, site: Site) -> nn.Module:
    """Convert a model that is itself a norm; a layer replaces it."""
    assert isinstance(method, Method)
    scope = Scope(record.contexts.count, record.contexts.names)
    layer = _build(method, site, model, record, scope, record.rows[0])
    record.verification = Verification(reason="the model is a single norm")
    layer.__dict__[RECORD] = record
    return layer


def find_targets(
    model: nn.Module,
    method: BaseMethod,
    options: Any,
    placement: str | None,
    select: Selector,
    exclude: Selector,
) -> tuple[list[Row], list[Any]]:
    """Return a row for everything considered, and the sites or places chosen."""
    if isinstance(method, InsertedMethod):
        return find_places(model, method, placement, options, select, exclude)
    if placement == "input":
        return place_at_input(model)
    if placement is not None:
        raise ConversionError(
            f"method {method.name!r} replaces norms where they are; expected placement=None, or "
            f"'input' for one before the model, got {placement!r}"
        )
    assert isinstance(method, Method)
    return _decide(model, method, select, exclude)


def is_bare(found: list[Any]) -> bool:
    """Return whether the model is itself the norm to replace."""
    return isinstance(found[0], Site) and found[0].fqn == ""


def operate(surgery: Surgery, method: BaseMethod, record: Record, found: list[Any]) -> None:
    """Change the model as the rows of the record say."""
    if isinstance(method, InsertedMethod):
        insert(surgery, method, record.rows, found, record.options)
    elif isinstance(found[0], Place):
        arguments = (record.rows[0], found[0], record.contexts, record.options)
        insert_at_input(surgery, method, *arguments)
    else:
        _replace(surgery, method, record, found)
    check_questions(surgery.model)
