"""What became of a model's norms and containers, and of an error, as records."""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

from torch import nn

import normswap


def structure(report: normswap.Report, model: nn.Module) -> dict[str, Any]:
    """Count norms by what became of them, and containers by how they are run."""
    inserted = report.count(action="inserted")
    refused = Counter(f"{r.source}: {r.reason}" for r in report.rows if r.action == "refused")
    # Layer norms and the like are listed by normswap as refused; they are no batch norms.
    other = sum(n for why, n in refused.items() if "neither a batch nor an instance" in why)
    opaque = []
    for name, reason in report.opaque.items():
        cls = type(model.get_submodule(name))
        cls = getattr(cls, "_normswap_from", cls)
        below = [
            r for r in report.rows if r.target and r.fqn.startswith(f"{name}." if name else "")
        ]
        kind = f"{cls.__module__}.{cls.__qualname__}"
        opaque.append({"name": name, "class": kind, "reason": reason, "sites": len(below)})
    return {
        "found": len(report.rows) - other,
        "replaced": report.count(action="replaced"),
        "inserted": inserted,
        "threaded": report.count(delivery="threaded"),
        "scoped": report.count(delivery="scoped"),
        "unreached": report.count(delivery="unreached"),
        "refused": {why: n for why, n in refused.items() if "neither a batch" not in why},
        "traced": report.traced,
        "opaque": opaque,
        "norm_reads": report.norm_reads,
    }


def describe(error: BaseException) -> str:
    """Say what was raised, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno})"
    text = " ".join(str(error).split())[:600]
    return f"{type(error).__name__}: {text}{where if frames else ''}"
