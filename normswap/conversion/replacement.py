"""Norms that layers of a method replace."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from normswap.conversion.adopt import adopt
from normswap.errors import ConversionError
from normswap.graph.scope.scope import Scope
from normswap.graph.surgery import Surgery
from normswap.lifecycle.record import Record
from normswap.lifecycle.replaced_norm import make_layer, remember_original
from normswap.methods.base import BaseMethod, Method
from normswap.methods.layer import ContextLayer
from normswap.report import Row
from normswap.sites import Place, Site, find_norms, read_site
from normswap.util.copies import attribute_tensors
from normswap.util.select import Selector, closest, why_kept

# Classes of torchvision, detectron2 and mmdetection that cut regions out of feature maps.
_POOLS = re.compile("roi_?(align|pool|extract)", re.IGNORECASE)

_Method = TypeVar("_Method", bound=BaseMethod)
_Where = TypeVar("_Where", Site, Place)
_Same = TypeVar("_Same", bound="Change[Any, Any]")


@dataclass(frozen=True)
class Change(ABC, Generic[_Method, _Where]):
    """What a conversion changes in a model, and how.

    Attributes:
        method: whose layers come.
        rows: everything that was considered.
        where: of each layer that comes.
    """

    method: _Method
    rows: list[Row]
    where: list[_Where]

    def on(self: _Same, device: torch.device) -> _Same:
        """Return the same with layers on another device."""
        return replace(self, where=[replace(each, device=device) for each in self.where])

    def advice(self, model: nn.Module, options: Any) -> str | None:
        """Return what the method warns of, before the model changes."""
        return None

    @abstractmethod
    def apply(self, surgery: Surgery, record: Record) -> nn.Module:
        """Change the model under surgery; return the converted one."""


class Bare(Change[Method, Site]):
    """A model that is itself the norm to replace: the layer is the converted model."""

    def apply(self, surgery: Surgery, record: Record) -> nn.Module:
        """Build the layer."""
        (site,), (row, *_) = self.where, self.rows
        scope = Scope(record.contexts.count, record.contexts.names)
        return build_layer(self.method, site, surgery.model, record, scope, row)


class Replacement(Change[Method, Site]):
    """Norms inside a model, each replaced at every name it has."""

    def advice(self, model: nn.Module, options: Any) -> str | None:
        """Return what the method warns of, before the model changes."""
        norms = [model.get_submodule(site.fqn) for site in self.where]
        if all(map(_is_frozen, norms, self.where)):
            return (
                "these norms are frozen, and so are the layers in their place, which learn nothing "
                'until normswap.freeze(model, "norms", stats="frozen"), whose also= names what else'
            )
        return self.method.advise(norms, options)

    def apply(self, surgery: Surgery, record: Record) -> nn.Module:
        """Swap every chosen norm and thread the context to it."""
        scope = Scope(record.contexts.count, record.contexts.names)
        rows = {row.fqn: row for row in self.rows}
        sources = [surgery.model.get_submodule(site.fqn) for site in self.where]
        layers = [
            build_layer(self.method, site, source, record, scope, rows[site.fqn])
            for site, source in zip(self.where, sources, strict=True)
        ]
        for site, layer in zip(self.where, layers, strict=True):
            surgery.swap((site.fqn, *site.aliases), layer)
        surgery.replace_references({id(s): layer for s, layer in zip(sources, layers, strict=True)})
        if self.method.needs_context:
            names = [name for site in self.where for name in (site.fqn, *site.aliases)]
            surgery.install(names, scope, tuple({type(layer) for layer in layers}))
        return surgery.model


def build_layer(
    method: Method, site: Site, source: nn.Module, record: Record, scope: Scope, row: Row
) -> nn.Module:
    """Build the layer that replaces a norm, and note in the row what became of it."""
    layer = make_layer(method, site, source, record.contexts, record.options)
    adopt(layer, source, site)
    remember_original(layer, source, site)
    if method.needs_context and isinstance(layer, ContextLayer):
        layer.scope = scope
    row.target = type(layer).__name__
    row.contexts = record.contexts.count if method.needs_context else 0
    row.parameters_after = sum(p.numel() for p in layer.parameters())
    row.statistics = "transferred" if site.tracked else "of each instance"
    return layer


def find_replacement(
    model: nn.Module, method: Method, select: Selector, exclude: Selector
) -> Replacement | Bare:
    """Return the norms to replace, at least one, with a row for every norm of the model."""
    rows: list[Row] = []
    chosen: list[Site] = []
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    # The modules that pool regions: how many a sample has, no shape tells.
    pools = [name for name, m in model.named_modules() if _POOLS.search(type(m).__name__)]
    regions = method.needs_context and select is None
    stages = [name.rpartition(".")[0] for name in pools if regions and "." in name]
    holders = Counter(map(id, attribute_tensors(model)))
    for fqn, module, aliases in find_norms(model):
        size = sum(p.numel() for p in module.parameters())
        row = Row(fqn, type(module).__name__, "refused", aliases, parameters_before=size)
        row.parameters_after = size
        rows.append(row)
        names = (fqn, *aliases)
        site = read_site(fqn, module, aliases, like)
        if why := why_kept(select, exclude, names, module):
            row.action, row.reason = "kept", why
        elif stage := next((s for s in stages if fqn.startswith(f"{s}.")), None):
            row.action = "kept"
            row.reason = f"its rows are regions that {stage} pools; labels of samples cannot follow"
        elif isinstance(site, str):
            row.reason = site
        else:
            row.channels = site.num_features
            row.reason = method.refuse(site) or _why_tied(module, holders)
            if not row.reason:
                row.action = "replaced"
                chosen.append(site)
    if not chosen:
        raise ConversionError(_nothing_to_replace(model, rows, select))
    root = [site for site in chosen if site.fqn == ""]
    return Bare(method, rows, root) if root else Replacement(method, rows, chosen)


def _is_frozen(norm: nn.Module, site: Site) -> bool:
    given = [p.requires_grad for p in norm.parameters(recurse=False)]
    return site.frozen or (bool(given) and not any(given))


def _why_tied(norm: nn.Module, holders: Counter[int]) -> str:
    """Return why a norm has to stay whose tensor is held elsewhere, too; "" where none is."""
    own = {**norm._parameters, **norm._buffers}
    name = next((n for n, t in own.items() if t is not None and holders[id(t)] > 1), "")
    return f"its {name} is tied: another module, or an attribute, holds it, too" if name else ""


def _nothing_to_replace(model: nn.Module, rows: list[Row], select: Selector) -> str:
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(f"{row.source}: {row.reason}", []).append(row.fqn or "(root)")
    listed = "; ".join(
        f"{len(names)} {why} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for why, names in by_reason.items()
    )
    return (
        f"found no norm to replace in {type(model).__name__}: {listed or 'it has none at all'}"
        f"{closest(select, [row.fqn for row in rows if row.reason == 'not selected'])}"
    )
