"""Layers joined to a model: at places in it, or one norm before it."""

from dataclasses import replace

import torch
from torch import nn

from normswap.conversion.replacement import Change, build_layer
from normswap.errors import ConversionError
from normswap.graph.blocks.insert import InsertedLayer
from normswap.graph.scope.scope import Scope
from normswap.graph.state import ContainerState
from normswap.graph.surgery import Surgery
from normswap.lifecycle.record import Record
from normswap.methods.base import InsertedMethod, Method
from normswap.methods.layer import NormLayer
from normswap.report import Row
from normswap.sites import Place, Site, read_site


class Insertion(Change[InsertedMethod, Place]):
    """Layers of a method at places of a model, whose norms stay."""

    def apply(self, surgery: Surgery, record: Record) -> nn.Module:
        """Build a layer for each place and put it there."""
        layers = [self.method.insert(place, record.options) for place in self.where]
        states: dict[nn.Module, ContainerState] = {}
        scope = Scope(1, ("0",))

        def state_of(fqn: str) -> tuple[nn.Module, ContainerState]:
            module = surgery.model.get_submodule(fqn)
            if module not in states:
                states[module] = ContainerState(fqn, scope, (), self.where[0].fqn)
            return module, states[module]

        chosen = [row for row in self.rows if row.action == "inserted"]
        for row, place, layer in zip(chosen, self.where, layers, strict=True):
            module, state = state_of(place.fqn)
            layer.train(module.training)
            child = surgery.add(module, self.method.name.replace("-", "_"), layer)
            _describe_layer(row, place, child, layer)
            if place.placement == "input" or place.before:
                state.before = child
            elif place.placement in ("norm", "output"):
                state.after = child
            else:
                state.insertions += (InsertedLayer(place.placement, place.block, child),)
                state.blocks = place.blocks
        schedule = self.method.connect(layers, record.options)
        if schedule is not None:
            state_of("")[1].schedule = schedule
        surgery.install_inserted(states)
        return surgery.model


class InputNorm(Change[Method, Place]):
    """One more norm, before the model, that starts as the identity in eval mode."""

    def apply(self, surgery: Surgery, record: Record) -> nn.Module:
        """Build the norm and put it there."""
        (place,), model = self.where, surgery.model
        if place.channels is None:
            raise ConversionError("cannot tell the channels of the input: no convolution or norm")
        source = nn.BatchNorm2d(place.channels, device=place.device, dtype=place.dtype)
        source.train(model.training)
        with torch.no_grad():
            # Batch norm adds eps to it: divided by a root of exactly one, the input stays as it is.
            source.running_var.fill_(1 - source.eps)  # type: ignore[union-attr]
        site = read_site("", source)
        assert isinstance(site, Site)
        site = replace(site, dims=())
        scope = Scope(record.contexts.count, record.contexts.names)
        layer = build_layer(self.method, site, source, record, scope, self.rows[0])
        child = surgery.add(model, "input_norm", layer)
        if isinstance(layer, NormLayer):
            layer.site = child
        _describe_layer(self.rows[0], place, child, layer)
        self.rows[0].statistics = "identity"
        state = ContainerState("", scope, (), child)
        state.before = child
        surgery.install_around(model, state, self.method.needs_context)
        return model


def _describe_layer(row: Row, place: Place, child: str, layer: nn.Module) -> None:
    """Note in a row what was inserted."""
    row.layer = f"{place.fqn}.{child}".lstrip(".")
    row.target = f"{type(layer).__name__} ({place.placement})"
    row.channels = place.channels or 0
    row.parameters_after = sum(p.numel() for p in layer.parameters())
