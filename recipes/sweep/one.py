"""Sweep one model: build it, convert it with each method, run the checks, give one record each."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import normswap

from .build import build_filled, build_on_meta, calibrate, count, is_norm, trim_repeats
from .checks import (
    LABELS,
    Findings,
    Subject,
    check_eval_again,
    check_mixed,
    check_preserved,
    check_training,
    examine_original,
    randomise,
)
from .outputs import Incomparable
from .sources import Candidate, candidate

GIB = 2**30
# What a process needs besides the model: torch, timm, activations at small inputs.
_OVERHEAD = 1.0 * GIB


@dataclass(frozen=True)
class Limits:
    """How a model is checked: memory for one process in bytes, and the seed of its weights."""

    memory: float
    seed: int = 0


@dataclass
class Prepared:
    """A model with random weights that runs, and what it outputs."""

    model: nn.Module
    subject: Subject
    expected: list[torch.Tensor]
    dependent: str
    label: str


def sweep_model(source: str, name: str, limits: Limits, methods: list[str]) -> Iterator[dict]:
    """Give one record for each method; whatever goes wrong is in the record."""
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {"model": name, "family": "", "status": "failed"}
    start = time.perf_counter(), time.process_time()
    shared: dict[str, Any] = {}
    prepared = shell = None
    try:
        shared["stage"] = "build"
        chosen = candidate(source, name)
        record["family"] = chosen.family
        shell = _shell(chosen)
        record.update(count(shell))
        if not record["norms"]:
            record["status"] = "no norms"
        else:
            scale = _scale(shell, record["parameters"], limits)
            record["check"] = "structure"
            if scale is not None:
                record["check"] = "reduced" if scale[0] else "full"
                shared["stage"] = "prepare"
                prepared = _prepare_in_any_precision(chosen, scale[1], scale[0], limits.seed)
                record["input"] = prepared.label
                record["dtype"] = str(prepared.subject.dtype).removeprefix("torch.")
        shared = {}
    except Exception as error:
        shared["error"] = _describe(error)
    for method in methods:
        result = {**record, "method": method, **shared}
        if not shared and record["status"] != "no norms":
            result.update(_sweep_method(shell, prepared, method, record["check"]))
        now = time.perf_counter(), time.process_time()
        result["seconds"], result["cpu_seconds"] = (round(b - a, 2) for a, b in zip(start, now))
        start = now
        yield result


def _shell(chosen: Candidate) -> nn.Module:
    try:
        return build_on_meta(lambda: chosen.build(**chosen.attempts[-1].options))
    except Exception:
        # Builders that compute with values cannot run without them.
        return chosen.build(**chosen.attempts[-1].options).eval()


def _scale(shell: nn.Module, parameters: int, limits: Limits) -> tuple[int, torch.dtype] | None:
    """Choose what of a model fits: how many of repeated blocks (0: all), and the precision.

    None where nothing fits.
    """
    sizes = {0: parameters}
    for keep in (2, 1):
        smaller = copy.deepcopy(shell)
        trim_repeats(smaller, keep)
        sizes[keep] = count(smaller)["parameters"]
    for keep, dtype in (
        *((0, torch.float64), (2, torch.float64), (0, torch.float32)),
        *((1, torch.float64), (2, torch.float32), (1, torch.float32)),
    ):
        if sizes[keep] * dtype.itemsize * 1.3 + _OVERHEAD <= limits.memory:
            return keep, dtype
    return None


def _prepare_in_any_precision(
    chosen: Candidate, dtype: torch.dtype, keep: int, seed: int
) -> Prepared:
    try:
        return _prepare(chosen, dtype, keep, seed)
    except RuntimeError:
        if dtype == torch.float32:
            raise
        # Code with float32 written into it.
        return _prepare(chosen, torch.float32, keep, seed)


def _prepare(chosen: Candidate, dtype: torch.dtype, keep: int, seed: int) -> Prepared:
    """Build the model and feed it in the first way that works.

    Raises:
        RuntimeError: none does; the message has the last error.
    """
    model, built, last = None, None, ""
    for attempt in chosen.attempts:
        try:
            if model is None or built != attempt.options:
                model = None
                model = build_filled(
                    lambda options=attempt.options: chosen.build(**options),
                    chosen.name,
                    seed,
                    dtype,
                    keep,
                )
                built = attempt.options
            subject = Subject(attempt.make, dtype, seed)
            calibrate(model, lambda m, s=subject: s.run(m, range(len(LABELS))))
            expected, dependent = examine_original(subject, model)
            return Prepared(model, subject, expected, dependent, attempt.label)
        except (MemoryError, Incomparable):
            raise
        except Exception as error:
            last = f"{attempt.label}: {_describe(error)}"
    raise RuntimeError(f"the original runs on none of the inputs tried; last {last}")


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
            result.update(_structure(report, shell))
        if prepared is None:
            result["status"] = "structure only"
            result["doubts"] = ["too large for a numerical check; give more --memory-gb"]
            return _clean(result)
        result["stage"] = "convert"
        converted = _convert(prepared.model, method, contexts, result)
        result["stage"] = "check"
        found = _check(prepared, converted, method, labelled, result)
        if check == "full":
            result.update(_structure(normswap.summary(converted), converted))
        result["numbers"] = found.numbers
        result["problems"], result["doubts"] = found.problems, found.doubts
        result["notes"] = found.notes
        result["status"] = "wrong" if found.problems else "undecided" if found.doubts else "ok"
    except normswap.NormswapError as error:
        refused = result["stage"] in ("plan", "convert")
        result["status"] = "refused" if refused else "failed"
        result["error"] = _describe(error)
    except Exception as error:
        result["status"], result["error"] = "failed", _describe(error)
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
    start = time.process_time()
    converted = normswap.convert(copied, method, contexts=contexts, inplace=True, verify=False)
    result["convert_seconds"] = round(time.process_time() - start, 4)
    try:
        from timm.layers import convert_sync_batchnorm
    except ImportError:
        convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm
    other = _copy(model)
    start = time.process_time()
    try:
        convert_sync_batchnorm(other)
        result["sync_seconds"] = round(time.process_time() - start, 4)
    except Exception as error:
        result["sync_error"] = _describe(error)
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
    randomise([*fresh, *buffers], owners)
    check_mixed(subject, converted, original, pairs, labelled, prepared.dependent, found)
    trained = [p for _, p in fresh if p.requires_grad]
    if not trained:  # a method without parameters: those of the norms it joined
        norms = [m for m in converted.modules() if is_norm(m)]
        trained = [p for m in norms for p in m.parameters(recurse=False) if p.requires_grad]
    state = list({id(b): b for _, b in buffers}.values())
    result["trained"] = len(trained)
    check_training(subject, converted, original, pairs, trained, state, labelled, found)
    has_statistics = any(name.endswith("running_mean") for name, _ in buffers)
    if method == "cn" and has_statistics and not found.numbers["moved"]:
        found.problems.append("training: no running statistics moved")
    if pairs:
        check_eval_again(subject, converted, original, pairs, labelled, found)
    return found


def _structure(report: Any, model: nn.Module) -> dict[str, Any]:
    """Count norms by what became of them, and containers by how they are run."""
    inserted = report.count(action="inserted")
    refused = Counter(f"{r.source}: {r.reason}" for r in report.rows if r.action == "refused")
    # Layer norms and the like are listed by normswap as refused; they are no batch norms.
    other = sum(n for why, n in refused.items() if "neither a batch nor an instance" in why)
    opaque = []
    for name, reason in report.opaque.items():
        cls = type(model.get_submodule(name))
        cls = getattr(cls, "converted_from", cls)
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
        "direct": report.direct,
    }


def _describe(error: BaseException) -> str:
    """Say what was raised, and where, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (at {'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno})"
    text = " ".join(str(error).split())[:600]
    return f"{type(error).__name__}: {text}{where if frames else ''}"
