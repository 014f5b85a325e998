"""The steps of the public functions, in order."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.contexts.assigner import Assigner
from normswap.conversion.advice import advise_freezing, batch_norms
from normswap.conversion.checks import check_model
from normswap.conversion.inputs import read_inputs
from normswap.conversion.settings import Settings, read_settings
from normswap.conversion.summary import summarise
from normswap.conversion.target import Target, carry_out, find_target
from normswap.conversion.verification import Reference, compare, run_original
from normswap.errors import AdviceWarning, ConversionError, expect_module, not_converted
from normswap.graph.not_copied import check_copyable
from normswap.graph.questions.bypassed import advise_leaving_out
from normswap.graph.scope.use_context import scopes_of
from normswap.graph.state import RECORD, context_argument
from normswap.graph.surgery import Surgery
from normswap.lifecycle.record import Record, find_inside, find_root
from normswap.lifecycle.training import exempt_norms
from normswap.methods.registry import get_method
from normswap.report import Report, Verification
from normswap.saving.fingerprint import mark, other_tensors
from normswap.util.arguments import check_flag
from normswap.util.copies import copy_model, copy_structure
from normswap.util.select import Selector


@torch.inference_mode(False)  # else what is made here could never be trained
def convert(
    model: nn.Module,
    method: str = "cn-x",
    *,
    contexts: int | Sequence[str] | Assigner | None = None,
    select: Selector = None,
    exclude: Selector = None,
    placement: str | None = None,
    preset: str | None = None,
    unknown: str | None = None,
    priors: Tensor | Sequence[float] | None = None,
    inplace: bool = False,
    example_inputs: Any = None,
    verify: bool = True,
    trace: bool = True,
    **options: Any,
) -> nn.Module:
    """Return the model with its norms replaced, computing the same function, taking ``context=``.

    Class, attributes, methods, hooks, modes, device and dtype stay; so do the state-dict keys of
    everything that is not replaced. Labels are an int64 tensor (N,) in [0, K) with -1 for unknown,
    names, or one name for the whole batch; they may mix within a batch.

    Args:
        model: any module that holds a norm.
        method: one of `normswap.methods()`.
        contexts: how many, their names, or an assigner (`normswap.contexts`), of which names and
            priors are taken; one by default, for which no label is needed. Left out, as `unknown`
            and `priors`, for a method without labels ("acn"): the model's forward then stays as it
            was.
        select: which norms to replace: "first" (the one that a forward meets first), glob,
            compiled regular expression, type, ``fn(name, module)``, or several; all by default. A
            name or expression that matches nothing is an error, a type or function is not.
        exclude: which to leave alone, in the same forms.
        placement: where a method that adds layers puts them: "norm" (after each norm), "output"
            (after each module that `select` names, such as a stage), "pre", "residual", "identity"
            or "post" in residual blocks, or "input"; each method has its default. A method that
            replaces norms takes "input" for one more norm before the model instead.
        preset: name of settings for the method, see `normswap.PRESETS`; what is given besides
            wins over them.
        unknown: what a sample without a label gets in eval: "pooled" (the mixture's one Gaussian),
            "posterior" (contexts weighed by how well they explain the instance), a context's name,
            or "error"; by default what serves the method best: "posterior" for "cn".
        priors: probability of each context, or counts; uniform by default.
        inplace: change `model` itself instead of a copy.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, batch first.
            Guessed for models that state their input size. They tell, too, which row of a norm is
            of which sample. Without, the first mixed batch tells that, unless it is compiled:
            compiled code takes norms with one row a sample, of which nothing was measured, to be
            in the order of the batch.
        verify: compare outputs before and after on the example inputs, in eval mode; the summary
            says how far they differ, or why nothing was compared.
        trace: run graphs in place of forwards that they stand for. Without, every module runs its
            own forward, to the same results; layers cannot be inserted inside a forward then.
        **options: of the method.

    Returns:
        The converted model: a copy, or `model` itself with `inplace`.

    Raises:
        ConversionError: a model, option or selection that cannot be converted.
        UnknownNameError: an unknown method or context.
        VerificationError: the converted model computes something else, with a method that keeps
            the function. Whatever is raised, `model` is as it was.

    Warns:
        AdviceWarning: another conversion, or frozen statistics, are known to serve such a model
            better, or forwards read tensors of replaced norms.
    """
    asked = read_settings(
        convert, method, contexts, select, exclude, placement, preset, unknown, priors, options
    )
    check_flag("inplace", inplace)
    check_flag("verify", verify)
    check_flag("trace", trace)
    inputs = None if example_inputs is None else read_inputs(example_inputs)
    check_model(model)
    if not inplace:
        check_copyable(model)
    chosen = asked.method
    target = find_target(model, asked)
    reference: Reference | Verification = Verification(reason="verify=False")
    if verify:
        labels = asked.contexts.count if chosen.needs_context else 0
        reference = run_original(model, inputs, labels)
    record = _record(model, asked, target)
    advice = target.advice(model, asked.options)
    names = batch_norms(model)
    with Surgery(model if inplace else copy_model(model), trace) as surgery:
        converted = carry_out(target, surgery, record)
        record.verification = _compare(converted, reference, record)
    converted.__dict__[RECORD] = record
    record.marks = mark(other_tensors(converted))
    for scope in scopes_of(converted):
        scope.watch.quiet = unknown is not None
    exempt_norms(converted)
    advice = advice or advise_freezing(converted, names)
    for text in filter(None, (advice, advise_leaving_out(converted))):
        warnings.warn(text, AdviceWarning, stacklevel=3)
    return converted


def plan(
    model: nn.Module,
    method: str = "cn-x",
    *,
    contexts: int | Sequence[str] | Assigner | None = None,
    select: Selector = None,
    exclude: Selector = None,
    placement: str | None = None,
    preset: str | None = None,
    unknown: str | None = None,
    priors: Tensor | Sequence[float] | None = None,
    trace: bool = True,
    **options: Any,
) -> Report:
    """Return what `convert` with these arguments would do, without tensors and without running.

    Raises:
        ConversionError: what `convert` would raise.
        UnknownNameError: an unknown method or context.
    """
    asked = read_settings(
        plan, method, contexts, select, exclude, placement, preset, unknown, priors, options
    )
    check_flag("trace", trace)
    check_model(model)
    target = find_target(model, asked)
    record = _record(model, asked, target)
    surgery = Surgery(copy_structure(model), trace)
    return summarise(carry_out(target.on(torch.device("meta")), surgery, record), record)


def _record(model: nn.Module, asked: Settings, target: Target) -> Record:
    return Record(
        asked.method.name,
        asked.options,
        asked.contexts,
        target.rows,
        type(model).__name__,
        placement=asked.placement,
    )


def summary(model: nn.Module) -> Report:
    """Return what was replaced in a converted model, and how far its contexts moved apart.

    Args:
        model: a converted model, or a module (a wrapper, a task) that holds one.

    Raises:
        ConversionError: no converted model there.
    """
    expect_module(model)
    found = find_inside(model)
    if found is None:
        raise not_converted(model, ", or normswap.plan to see what it would do")
    return summarise(*found)


def verify(model: nn.Module, original: nn.Module, example_inputs: Any = None) -> Verification:
    """Compare a converted model with the original, in eval mode, for every context.

    Args:
        model: the converted model, perhaps compiled or in DDP; the model itself is run.
        original: the model before conversion.
        example_inputs: as for `convert`.

    Returns:
        The largest output difference for each context, mixed in batches, and for unknown labels.

    Raises:
        ConversionError: `model` is not converted, or `original` is; no inputs that the original
            runs on, or none of its outputs finite, so that nothing was compared.
        VerificationError: they differ beyond rounding, with a method that keeps the function.
    """
    root, record = find_root(model)
    expect_module(original)
    if find_inside(original) is not None:
        raise ConversionError(
            "expected the model before conversion as `original`, got a converted one, which would "
            "be compared with itself; with inplace=True keep a copy to verify against"
        )
    if any(t.is_meta for t in (*root.parameters(), *root.buffers())):
        raise ConversionError("nothing to verify: the converted model has no values (meta device)")
    inputs = None if example_inputs is None else read_inputs(example_inputs)
    labels = record.contexts.count if get_method(record.method).needs_context else 0
    result = _compare(root, run_original(original, inputs, labels), record)
    if result.reason:
        raise ConversionError(f"nothing to verify on: {result.reason}")
    return result


def _compare(model: nn.Module, reference: Reference | Verification, record: Record) -> Verification:
    """Compare a converted model with the original's outputs, where there are any."""
    if isinstance(reference, Verification):
        return reference
    contexts, method = record.contexts, get_method(record.method)
    argument = context_argument(model) if method.needs_context else None
    may_omit = contexts.unknown != "error" or contexts.count == 1
    return compare(model, reference, contexts.names, argument, may_omit, method.keeps_function)
