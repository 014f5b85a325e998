"""Sweep one model: build it, convert it with each method, run the checks, give one record each."""

from __future__ import annotations

import copy
import functools
import gc
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import normswap

from .build import count, is_norm
from .checks import (
    check_eval_again,
    check_mixed,
    check_one_reverted,
    check_preserved,
    check_reverted,
    check_training,
)
from .layers import randomise
from .outputs import Incomparable
from .prepare import Limits, Prepared, build_shell, choose_scale, prepare
from .sources import candidate, narrowed
from .structure import describe, structure
from .subject import LABELS, Findings

try:
    from timm.layers import convert_sync_batchnorm
except ImportError:
    convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm


def sweep_model(source: str, name: str, limits: Limits, methods: list[str]) -> Iterator[dict]:
    """Give one record for each method; whatever goes wrong is in the record."""
    warnings.simplefilter("ignore")
    _warm_up()
    record: dict[str, Any] = {"model": name, "family": "", "status": "failed"}
    start = time.perf_counter(), time.process_time()
    shared: dict[str, Any] = {}
    prepared = shell = None
    try:
        shared["stage"] = "build"
        chosen = candidate(source, name)
        if limits.blocks:
            chosen = narrowed(chosen)
        record["family"] = chosen.family
        shell = build_shell(chosen)
        record.update(count(shell))
        if not record["norms"]:
            record["status"] = "no norms"
        else:
            record["check"] = "structure"
            scale = None
            if not limits.structure:
                scale = choose_scale(shell, record["parameters"], limits)
            if scale is not None:
                shared["stage"] = "prepare"
                try:
                    prepared = prepare(chosen, scale[1], scale[0], limits.seed)
                except (RuntimeError, Incomparable):
                    if not limits.blocks:
                        raise
                    # Code that counts on the number of its blocks.
                    limits = replace(limits, blocks=0)
                    scale = choose_scale(shell, record["parameters"], limits)
                    prepared = prepare(chosen, scale[1], scale[0], limits.seed)
                record["check"] = "reduced" if scale[0] else "full"
                record["input"] = prepared.label
                record["dtype"] = str(prepared.subject.dtype).removeprefix("torch.")
        shared = {}
    except Exception as error:
        shared["error"] = describe(error)
    for method in methods:
        result = {**record, "method": method, **shared}
        if not shared and record["status"] != "no norms":
            result.update(_sweep_method(shell, prepared, method, record["check"]))
            if limits.structure and result["status"] == "structure only":
                result["status"], result["doubts"] = "planned", []
        now = time.perf_counter(), time.process_time()
        result["seconds"], result["cpu_seconds"] = (
            round(b - a, 2) for a, b in zip(start, now, strict=True)
        )
        start = now
        yield result


@functools.cache
def _warm_up() -> None:
    """Convert something small, so that no model's time has the imports of the first in it."""
    normswap.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "cn", verify=False)


def _sweep_method(
    shell: nn.Module, prepared: Prepared | None, method: str, check: str
) -> dict[str, Any]:
    result: dict[str, Any] = {"stage": "convert"}
    labelled = normswap.get_method(method).needs_context
    contexts = len(LABELS) if labelled else None
    try:
        if check != "full":
            result["stage"] = "plan"
            report = normswap.plan(shell, method, contexts=contexts)
            result.update(structure(report, shell))
        if prepared is None:
            result["status"] = "structure only"
            result["doubts"] = ["too large for a numerical check; give more --memory-gb"]
            return _clean(result)
        result["stage"] = "convert"
        converted = _convert(prepared.model, method, contexts, result)
        result["stage"] = "check"
        found = _check(prepared, converted, method, labelled, result)
        if check == "full":
            result.update(structure(normswap.summary(converted), converted))
        result["numbers"] = found.numbers
        result["problems"], result["doubts"] = found.problems, found.doubts
        result["notes"] = found.notes
        result["status"] = "wrong" if found.problems else "undecided" if found.doubts else "ok"
    except normswap.NormswapError as error:
        refused = result["stage"] in ("plan", "convert")
        result["status"] = "refused" if refused else "failed"
        result["error"] = describe(error)
    except Exception as error:
        result["status"], result["error"] = "failed", describe(error)
    return _clean(result)


def _clean(result: dict[str, Any]) -> dict[str, Any]:
    if result["status"] not in ("failed", "refused"):
        del result["stage"]
    return result


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model but for its parameters, which nothing here changes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _convert(
    model: nn.Module, method: str, contexts: int | None, result: dict[str, Any]
) -> nn.Module:
    """Convert a copy, timed, and time what timm's converter to SyncBatchNorm takes beside it."""
    copied = _copy(model)
    gc.collect()  # what earlier work left to collect is no part of this
    start = time.process_time()
    converted = normswap.convert(copied, method, contexts=contexts, inplace=True, verify=False)
    result["convert_seconds"] = round(time.process_time() - start, 4)
    other = _copy(model)
    start = time.process_time()
    try:
        convert_sync_batchnorm(other)
        result["sync_seconds"] = round(time.process_time() - start, 4)
    except Exception as error:
        result["sync_error"] = describe(error)
    return converted


def _check(
    prepared: Prepared,
    converted: nn.Module,
    method: str,
    labelled: bool,
    result: dict[str, Any],
) -> Findings:
    found = Findings()
    original, subject = prepared.model, prepared.subject
    known = {id(p) for p in original.parameters()}
    fresh = [(n, p) for n, p in converted.named_parameters() if id(p) not in known]
    rows = normswap.summary(converted).rows
    replaced = [row.fqn for row in rows if row.action == "replaced"]
    pairs = [(original.get_submodule(n), converted.get_submodule(n)) for n in replaced]
    layers = [layer for _, layer in pairs]
    buffers = [
        (f"{name}.{key}", buffer)
        for name, (_, layer) in zip(replaced, pairs, strict=True)
        for key, buffer in layer.named_buffers()
    ]
    owners = {id(b): layer for layer in layers for b in layer.buffers()}
    check_preserved(subject, converted, prepared.expected, labelled, found)
    reverted = normswap.revert(_copy(converted), inplace=True)
    check_reverted(subject, reverted, original, prepared.expected, found)
    randomise([*fresh, *buffers], owners)
    check_mixed(subject, converted, original, pairs, labelled, prepared.dependent, found)
    if pairs and labelled:
        reverted = normswap.revert(_copy(converted), 1, inplace=True)
        check_one_reverted(subject, reverted, original, pairs, found)
    trained = [p for _, p in fresh if p.requires_grad]
    if not trained:  # a method without parameters: those of the norms it joined
        norms = [m for m in converted.modules() if is_norm(m)]
        trained = [p for m in norms for p in m.parameters(recurse=False) if p.requires_grad]
    # What lies before the norms gets its gradient through all of them; frozen ones have no other.
    trained += [p for p in original.parameters() if p.requires_grad and p.dim() > 1][:1]
    state = list({id(b): b for _, b in buffers}.values())
    result["trained"] = len(trained)
    check_training(subject, converted, original, pairs, trained, state, labelled, found)
    # Frozen norms, which are no norms of torch, keep theirs.
    moving = any(isinstance(n, _NormBase) and n.running_mean is not None for n, _ in pairs)
    if method == "cn" and moving and not found.numbers["moved"]:
        found.problems.append("training: no running statistics moved")
    if pairs:
        check_eval_again(subject, converted, original, pairs, labelled, found)
    return found
