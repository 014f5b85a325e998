"""Put together what a conversion did with how the converted model stands now."""

import copy
from dataclasses import asdict

from torch import nn
from torch.nn.parameter import is_lazy

from normswap.functional.moments import gaussian_divergence
from normswap.graph.questions.bypassed import find_bypassed
from normswap.graph.reach import find_reach
from normswap.graph.state import context_argument
from normswap.lifecycle.record import Record, weights_of
from normswap.lifecycle.replaced_norm import original_of
from normswap.methods.base import Contexts, Method, get_method
from normswap.methods.layer import ContextLayer
from normswap.report import Report
from normswap.util.arguments import listed


def summarise(root: nn.Module, record: Record) -> Report:
    """Return the report of a converted model: its record, deliveries and divergences."""
    reach = find_reach(root)
    method = get_method(record.method)
    rows = [copy.copy(row) for row in record.rows]
    # By the names they had at conversion: what holds them may have been wrapped since.
    found = ((original_of(module), module) for module in root.modules())
    layers = {original.site.fqn: module for original, module in found if original is not None}
    for row in rows:
        if row.action in ("replaced", "inserted") and isinstance(method, Method):
            layer = layers.get(row.fqn)
            if layer is None:
                row.delivery = "unreached"
                continue
            if method.needs_context and not row.layer:
                row.delivery = reach.delivery.get(id(layer), "unreached")
                verified = record.contexts.count > 1 and record.verification is not None
                if verified and isinstance(layer, ContextLayer) and layer.scope is not None:
                    row.rows = layer.scope.rows.describe(row.fqn)
            statistics = method.statistics(layer)
            if statistics is not None and not method.needs_context:
                row.components = statistics.mean.shape[0]
            if statistics is not None and not statistics.mean.is_meta:
                weights = weights_of(record, method, layer).to(statistics.mean.device)
                row.divergence = gaussian_divergence(statistics, weights)
    sizes = [(p.numel(), p.requires_grad) for p in root.parameters() if not is_lazy(p)]
    return Report(
        model=record.model,
        method=record.method,
        options=asdict(record.options),
        contexts=record.contexts.names if method.needs_context else (),
        priors=tuple(record.contexts.priors.tolist()) if method.needs_context else (),
        unknown=_policy(record.contexts),
        rows=rows,
        opaque=reach.opaque,
        traced=reach.traced,
        norm_reads=find_bypassed(root),
        verification=record.verification,
        argument=context_argument(root),
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trained in sizes if trained),
    )


def _policy(contexts: Contexts) -> str:
    """Return what samples without a label get, in words."""
    names, unknown = contexts.names, contexts.unknown
    if isinstance(unknown, int):
        return names[unknown]
    few = unknown != "error" and contexts.answering is not None
    return f"{unknown} of {listed(names[: contexts.answering])}" if few else unknown
