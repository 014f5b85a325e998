"""Checks of what comes after conversion: back again, specialised, saved, one context more."""

import copy
import pickle
import tempfile
import warnings
from importlib.util import find_spec

import torch
from torch import nn

from normswap.api import summary
from normswap.errors import ContextWarning, ConversionError, NormswapError
from normswap.lifecycle.change_contexts import add_context, remove_context
from normswap.lifecycle.record import method_layers
from normswap.lifecycle.revert import revert, specialize
from normswap.lifecycle.training import freeze
from normswap.lifecycle.unknown import set_unknown
from normswap.saving.checkpoint import load, save
from normswap.testing.case import (
    LABELS,
    NAMES,
    Case,
    Labels,
    check,
    move,
    require,
    require_close,
    require_equal,
    require_raises,
    require_same_state,
)
from normswap.testing.models import make_inputs, make_model


@check()
def check_reverts_to_the_bit(case: Case) -> None:
    """Reverted at once, a model is the original: its classes, attributes and values to the bit."""
    for dtype in (torch.float32, torch.float64):
        # What holds for every model in float32 needs one to hold in float64 too.
        for base, x in list(case.bases(dtype))[: None if dtype == torch.float32 else 1]:
            name, model = type(base).__name__, case.convert(base)
            converted = copy.deepcopy(model.state_dict())
            back = revert(model)
            require_same_state(model, converted, f"{name}: the converted model, left alone")
            own, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            require(revert(own, inplace=True) is own, f"{name}: inplace=True makes another object")
            for twin in (back, own, revert(pickled)):
                require("context" not in str(twin.forward.__doc__), f"{name}: forward is converted")
                require_same_state(twin, base.state_dict(), name)
                for (fqn, one), (other, two) in zip(
                    base.named_modules(), twin.named_modules(), strict=True
                ):
                    require(fqn == other and type(one) is type(two), f"{name}: {fqn}: {type(two)}")
                    apart = vars(one).keys() ^ vars(two).keys()
                    require(not apart, f"{name}: {fqn}: attributes {apart} on one side only")
            require_equal(case.in_eval(back, x), case.in_eval(base, x), name)
            again = case.convert(back)
            apart = again.state_dict().keys() ^ converted.keys()
            require(not apart, f"{name}: converted again, keys {apart} on one side only")


@check(input_dependent=False)
def check_specialises_to_plain_norms(case: Case) -> None:
    """A trained model has a plain one of the original's classes for each context."""
    for base, x in case.bases():
        name = type(base).__name__
        model = case.trained(name, **case.pooled)
        for context in [*NAMES, "pooled"] if case.labelled else [None]:
            plain = specialize(model, context)
            kinds = [type(m) for m in base.modules()], [type(m) for m in plain.modules()]
            require(kinds[0] == kinds[1], f"{name}: classes {kinds[1]}, not {kinds[0]}")
            label = None if context == "pooled" else context
            expected = case.in_eval(model, x, label)
            require_close(case.in_eval(plain, x), expected, f"{name}, context {context}")


@check(input_dependent=True)
def check_refuses_to_specialise(case: Case) -> None:
    """What no plain norm equals is an error of `specialize`, which changes nothing."""
    model = case.trained()
    before = copy.deepcopy(model.state_dict())
    context = NAMES[0] if case.labelled else None
    require_raises(lambda: specialize(model, context, inplace=True), ConversionError, "trained")
    require_same_state(model, before, "after the error")


@check()
def check_moves(case: Case) -> None:
    """A model changes its dtype and device, and its contexts can be trained alone."""
    model, x = case.convert(make_model()).double(), make_inputs(make_model(dtype=torch.float64))
    for label in case.labels:
        dtype = case.in_eval(model, x, label).dtype
        require(dtype == torch.float64, f".double(): outputs for context {label} are {dtype}")
    there = [name for name, t in model.to("meta").state_dict().items() if not t.is_meta]
    require(not there, f'.to("meta"): {there} stay')
    if not case.labelled:
        return
    tables: set[str] = set()
    for site, layer in method_layers(model).items():
        named = set(getattr(layer, "context_parameters", ()))
        rows = {n for n, p in layer.named_parameters() if p.dim() > 1 and len(p) == len(NAMES)}
        kind = f"{site}: {type(layer).__name__}.context_parameters"
        require(named == rows, f"{kind} is {sorted(named)}; of shape (K, ...) are {sorted(rows)}")
        tables |= {f"{site}.{name}" for name in rows}
    if not tables:
        require_raises(lambda: freeze(model, "contexts"), ConversionError, "nothing to train")
        return
    freeze(model, "contexts")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    require(trained == tables, f"freeze(model, 'contexts') trains {sorted(trained)}")


@check()
def check_reverts_to_a_context_or_on_discard(case: Case) -> None:
    """Trained, `revert` asks whose norms to take; ``discard=True`` takes those of conversion."""
    model, base = case.trained(), make_model(dtype=torch.float64)
    if not case.labelled:
        require_raises(lambda: revert(model, "b"), ConversionError, "without contexts")
    elif not case.method.input_dependent:
        require_raises(lambda: revert(model), ConversionError, "contexts that differ")
        x = make_inputs(model)
        found = case.in_eval(revert(model, "b"), x)
        require_close(found, case.in_eval(model, x, "b"), "reverted to a context")
    require_same_state(revert(model, discard=True), base.state_dict(), "discard=True")
    with torch.no_grad():
        model.get_parameter("head.weight").fill_(3)
    kept = revert(model, discard=True).get_parameter("head.weight")
    require_equal(kept, torch.full_like(kept, 3), "weights of other layers")


@check(lambda method: find_spec("safetensors") is not None)
def check_saves_and_loads(case: Case) -> None:
    """A saved conversion, loaded onto the original, is the same to the bit, and saves again."""
    for base, x in case.bases():
        name, model = type(base).__name__, case.trained(type(base).__name__)
        with tempfile.TemporaryDirectory() as folder:
            save(model, folder)
            twin = load(base, folder)
            save(twin, f"{folder}/again")
            again = load(base, f"{folder}/again")
        require_same_state(twin, model.state_dict(), name)
        require_same_state(again, model.state_dict(), f"{name}, saved again")
        for label in case.labels:
            expected = case.in_eval(model, x, label)
            require_equal(case.in_eval(twin, x, label), expected, f"{name}, context {label}")


@check(needs_context=True)
def check_adds_contexts(case: Case) -> None:
    """An added context computes what it is like; the others what they did; removed, it is gone."""
    model = case.trained(**case.pooled)
    state = copy.deepcopy(model.state_dict())
    x = make_inputs(model)
    given: list[Labels] = [0, 1, 2, LABELS]
    before = [case.in_eval(model, x, label) for label in given]
    unknown = case.in_eval(model, x)
    kept = copy.deepcopy(model)
    add_context(kept, "d", like="b", keep_unknown=True)
    require_close(case.in_eval(kept, x), unknown, "without a label, with keep_unknown=True")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        indices = [add_context(model, "d"), add_context(model, "e", like="b", share=0.1)]
    require(indices == [3, 4], f"expected indices 3 and 4, got {indices}")
    for label, expected in zip(given, before, strict=True):
        require_equal(case.in_eval(model, x, label), expected, f"context {label}")
    require_close(case.in_eval(model, x, "d"), unknown, "like the pooled")
    require_close(case.in_eval(model, x, "e"), before[1], "like b")
    for name in ("e", "d"):
        remove_context(model, name)
    require_same_state(model, state, "the contexts added and removed")


@check()
def check_adds_a_context_whole_or_not_at_all(case: Case) -> None:
    """`add_context` that fails, or a method without contexts, changes nothing."""
    model = case.convert(make_model())
    before = copy.deepcopy(model.state_dict())
    stranger = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    require_raises(lambda: add_context(model, "d", optimizer=stranger), NormswapError, "a stranger")
    require_same_state(model, before, "after the error")
    names = summary(model).contexts
    require(names == (NAMES if case.labelled else ()), f"contexts {names}")


@check(needs_context=True)
def check_policies_for_unknown_labels(case: Case) -> None:
    """`set_unknown` makes the model that conversion with ``unknown=`` makes, in its own words."""
    model, x = case.trained(), make_inputs(make_model(dtype=torch.float64))
    unlabelled = torch.full((len(x),), -1)
    for policy in ("pooled", "posterior", "b"):
        twin = move(case.convert(make_model(dtype=torch.float64), unknown=policy))
        set_unknown(model, policy)
        either: list[Labels] = [unlabelled, None]
        for label in either:
            found, expected = (case.in_eval(m, x, label) for m in (model, twin))
            require_equal(found, expected, f"unknown={policy!r}, labels {label}")
    require_equal(found, case.in_eval(model, x, "b"), "unknown='b'")
    set_unknown(model, "error")
    require_raises(lambda: case.in_eval(model, x, unlabelled), NormswapError, "unknown='error'")
