"""The steps of the public functions, in order."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normswap.checks import check_model
from normswap.contexts.priors import check_priors
from normswap.errors import ConversionError, UnknownNameError
from normswap.functional.moments import gaussian_divergence
from normswap.graph.container import context_argument
from normswap.graph.reach import find_reach
from normswap.graph.scope import Scope
from normswap.graph.surgery import Surgery
from normswap.methods.base import Contexts, Method, get_method, parse_options
from normswap.methods.layer import POLICIES
from normswap.report import Report, Row, Verification
from normswap.select import Selector, matches
from normswap.sites import Site, find_norms, read_site
from normswap.verification import compare, eval_outputs, make_inputs, widen

_RECORD = "_normswap_record"


@dataclass
class _Record:
    """What a converted model remembers of its conversion; kept on its root."""

    method: str
    options: Any
    contexts: Contexts
    rows: list[Row]
    model: str
    verification: Verification | None = None


def convert(
    model: nn.Module,
    method: str = "cn-x",
    *,
    contexts: int | Sequence[str] | None = None,
    select: Selector = None,
    exclude: Selector = None,
    unknown: str = "pooled",
    priors: Tensor | Sequence[float] | None = None,
    inplace: bool = False,
    example_inputs: Any = None,
    verify: bool = True,
    **options: Any,
) -> nn.Module:
    """Return the model with its norms replaced, computing the same function, taking ``context=``.

    Class, attributes, methods, hooks, modes, device and dtype stay; so do the state-dict keys of
    everything that is not replaced. Labels are an int64 tensor (N,) in [0, K) with -1 for unknown,
    names, or one name for the whole batch; they may mix within a batch.

    Args:
        model: any module that holds a norm.
        method: one of `normswap.methods()`.
        contexts: how many, or their names; one by default, for which no label is needed.
        select: which norms to replace: glob, compiled regular expression, type,
            ``fn(name, module)``, or several; all by default.
        exclude: which to leave alone, in the same forms.
        unknown: what a sample without a label gets in eval: "pooled" (the mixture's one Gaussian),
            "posterior" (contexts weighed by how well they explain the instance), a context's name,
            or "error".
        priors: probability of each context, or counts; uniform by default.
        inplace: change `model` itself instead of a copy.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, batch first.
            Made by itself for models that state their input size.
        verify: compare outputs before and after on the example inputs, in eval mode.
        **options: of the method.

    Returns:
        The converted model: a copy, or `model` itself with `inplace`.

    Raises:
        ConversionError: a model, option or selection that cannot be converted.
        UnknownNameError: an unknown method or context.
        VerificationError: the converted model computes something else. Whatever is raised, `model`
            is as it was.
    """
    chosen = get_method(method)
    parsed = parse_options(chosen, options)
    given = _make_contexts(contexts, priors, unknown)
    check_model(model)
    rows, _ = _decide(model, chosen, select, exclude)
    inputs: Any = "verify=False" if not verify else example_inputs
    if verify and inputs is None:
        inputs = make_inputs(model)
    expected = None
    if not isinstance(inputs, str):
        inputs = widen(inputs, given.count)
        expected = eval_outputs(model, inputs)
    target = model if inplace else copy.deepcopy(model)
    record = _Record(method, parsed, given, rows, type(model).__name__)
    if rows[0].fqn == "" and rows[0].action == "replaced":
        return _convert_bare(target, chosen, record)
    surgery = Surgery(target)
    try:
        _operate(surgery, chosen, record, select, exclude)
        if expected is None:
            record.verification = Verification(reason=inputs)
        else:
            record.verification = compare(
                target,
                lambda _: expected,
                inputs,
                given.names,
                context_argument(target) if chosen.needs_context else None,
                unknown != "error" or given.count == 1,
            )
    except BaseException:
        surgery.undo()
        raise
    target.__dict__[_RECORD] = record
    return target


def plan(
    model: nn.Module,
    method: str = "cn-x",
    *,
    contexts: int | Sequence[str] | None = None,
    select: Selector = None,
    exclude: Selector = None,
    unknown: str = "pooled",
    priors: Tensor | Sequence[float] | None = None,
    **options: Any,
) -> Report:
    """Return what `convert` with these arguments would do, without tensors and without running.

    Raises:
        ConversionError: what `convert` would raise.
        UnknownNameError: an unknown method or context.
    """
    check_model(model)
    shell = structure_copy(model)
    arguments: dict[str, Any] = {"contexts": contexts, "select": select, "exclude": exclude}
    arguments.update(unknown=unknown, priors=priors, inplace=True, verify=False, **options)
    report = summary(convert(shell, method, **arguments))
    report.verification = None
    return report


def structure_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers hold no values (meta device)."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


def summary(model: nn.Module) -> Report:
    """Return what was replaced in a converted model, and how its contexts have moved apart.

    Args:
        model: a converted model, or a module (a wrapper, a task) that holds one.

    Raises:
        ConversionError: no converted model there.
    """
    for root in model.modules():
        record: _Record | None = vars(root).get(_RECORD)
        if record is not None:
            return _summarise(root, record)
    raise ConversionError(
        f"expected a converted model, got {type(model).__name__}; call normswap.convert first, or "
        "normswap.plan to see what it would do"
    )


def verify(model: nn.Module, original: nn.Module, example_inputs: Any = None) -> Verification:
    """Compare a converted model with the original, in eval mode, for every context.

    Args:
        model: the converted model.
        original: the model before conversion.
        example_inputs: as for `convert`.

    Returns:
        The largest output difference for each context, mixed in batches, and for unknown labels.

    Raises:
        ConversionError: no inputs could be made, or `model` is not converted.
        VerificationError: they differ beyond rounding.
    """
    record: _Record | None = vars(model).get(_RECORD)
    if record is None:
        raise ConversionError(f"expected a converted model, got {type(model).__name__}")
    inputs = make_inputs(original) if example_inputs is None else example_inputs
    if isinstance(inputs, str):
        raise ConversionError(f"nothing to verify on: {inputs}")
    return compare(
        model,
        lambda given: eval_outputs(original, given),
        widen(inputs, record.contexts.count),
        record.contexts.names,
        context_argument(model),
        record.contexts.unknown != "error" or record.contexts.count == 1,
    )


def _make_contexts(contexts: int | Sequence[str] | None, priors: Any, unknown: str) -> Contexts:
    if contexts is None:
        contexts = 1
    if isinstance(contexts, bool) or not isinstance(contexts, int | Sequence):
        raise ConversionError(
            f"expected contexts= as a count or a sequence of names, got {contexts!r}"
        )
    if isinstance(contexts, str):
        raise ConversionError(f"expected several names, got one string; write [{contexts!r}]")
    names = tuple(map(str, range(contexts))) if isinstance(contexts, int) else tuple(contexts)
    if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise ConversionError(f"expected at least one context, names distinct, got {contexts!r}")
    policy: str | int = unknown
    if unknown not in POLICIES:
        if unknown not in names:
            choices = ", ".join((*POLICIES, *names))
            raise UnknownNameError(f"unknown= is {unknown!r}; the choices are {choices}")
        policy = names.index(unknown)
    return Contexts(names, check_priors(priors, len(names)), policy)


def _decide(
    model: nn.Module, method: Method, select: Selector, exclude: Selector
) -> tuple[list[Row], list[tuple[Site, nn.Module]]]:
    """Return a row for every norm, and the sites to replace."""
    rows, chosen = [], []
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
                chosen.append((site, module))
    if not chosen:
        listed = "; ".join(f"{r.fqn or '(root)'} ({r.source}): {r.reason}" for r in rows[:20])
        more = f"; and {len(rows) - 20} more" if len(rows) > 20 else ""
        raise ConversionError(
            f"found no norm to replace in {type(model).__name__}"
            + (f"; found and left alone: {listed}{more}" if rows else ": it has no norm at all")
        )
    return rows, chosen


def _operate(
    surgery: Surgery, method: Method, record: _Record, select: Selector, exclude: Selector
) -> None:
    """Swap every chosen norm and thread the context to it."""
    _, chosen = _decide(surgery.model, method, select, exclude)
    scope = Scope(record.contexts.count, record.contexts.names)
    replaced = {row.fqn: row for row in record.rows if row.action == "replaced"}
    built = [
        (site, _build(method, site, module, record, scope, replaced[site.fqn]))
        for site, module in chosen
    ]
    for site, layer in built:
        surgery.swap((site.fqn, *site.aliases), layer)
    if method.needs_context:
        names = [name for site, _ in built for name in (site.fqn, *site.aliases)]
        surgery.install(names, scope, tuple({type(layer) for _, layer in built}))


def _build(
    method: Method, site: Site, module: nn.Module, record: _Record, scope: Scope, row: Row
) -> nn.Module:
    layer = method.build(site, module, record.contexts, record.options)
    if method.needs_context:
        layer.scope = scope  # type: ignore[assignment]
    row.target = type(layer).__name__
    row.contexts = record.contexts.count
    row.parameters_after = sum(p.numel() for p in layer.parameters())
    row.statistics = "transferred" if site.tracked else "of each instance"
    return layer


def _convert_bare(model: nn.Module, method: Method, record: _Record) -> nn.Module:
    """Convert a model that is itself a norm; a layer replaces it."""
    site = read_site("", model)
    assert isinstance(site, Site)
    scope = Scope(record.contexts.count, record.contexts.names)
    layer = _build(method, site, model, record, scope, record.rows[0])
    record.verification = Verification(reason="the model is a single norm")
    layer.__dict__[_RECORD] = record
    return layer


def _summarise(root: nn.Module, record: _Record) -> Report:
    reach = find_reach(root)
    method = get_method(record.method)
    rows = [copy.copy(row) for row in record.rows]
    for row in rows:
        if row.action == "replaced":
            layer = root.get_submodule(row.fqn)
            row.delivery = (
                reach.delivery.get(id(layer), "unreached") if method.needs_context else ""
            )
            statistics = method.statistics(layer)
            if statistics is not None and not statistics.mean.is_meta:
                priors = record.contexts.priors.to(statistics.mean.device)
                row.divergence = gaussian_divergence(statistics, priors)
    unknown = record.contexts.unknown
    return Report(
        model=record.model,
        method=record.method,
        contexts=record.contexts.names,
        priors=tuple(record.contexts.priors.tolist()),
        unknown=record.contexts.names[unknown] if isinstance(unknown, int) else unknown,
        rows=rows,
        opaque=reach.opaque,
        traced=reach.traced,
        direct=reach.direct,
        verification=record.verification,
    )
