"""The contract, for every registered method and for one that only this file knows."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap
from normswap.errors import ContractError
from normswap.functional import Affine, Moments, apply_affine, fold_norm
from normswap.methods.base import Contexts, Method, affine_tensors
from normswap.methods.layer import ContextLayer, load_shared
from normswap.methods.norm_values import PlainNorm, added_prior, pick
from normswap.methods.registry import _REGISTRY
from normswap.sites import Site
from normswap.testing import check_method, method_checks
from tests.support.models import make_model
from tests.support.sampling import sampled


class ShiftNorm(ContextLayer):
    """Normalises with fixed, shared statistics, then applies an affine for each context."""

    context_parameters = ("weight", "bias")

    def __init__(self, norm: nn.Module, site: Site, contexts: Contexts) -> None:
        super().__init__(site.num_features, contexts.count, contexts.unknown)
        shape = (contexts.count, site.num_features)
        weight, bias = affine_tensors(norm, site)
        self.weight = nn.Parameter(weight.expand(shape).clone())
        self.bias = nn.Parameter(bias.expand(shape).clone())
        self.eps, self.tracked = site.eps, site.tracked
        if site.tracked:
            self.register_buffer("running_mean", norm.running_mean.clone())
            self.register_buffer("running_var", norm.running_var.clone())
            count = getattr(norm, "num_batches_tracked", torch.tensor(0))
            self.register_buffer("num_batches_tracked", count.clone())
        self.add_priors(contexts.priors, site.device, site.dtype)

    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        if self.tracked:
            moments = Moments(self.running_mean[None], self.running_var[None])
        else:
            var, mean = torch.var_mean(x, dim=tuple(range(2, x.dim())), correction=0)
            moments = Moments(mean, var)
        known = Affine(self.weight, self.bias)
        if isinstance(self.unknown, int):
            other = Affine(*(t[self.unknown : self.unknown + 1] for t in known))
        else:
            other = known.mix(self.mixing(self.weight.dtype)[None])
        if labels is None:
            return apply_affine(x, fold_norm(moments, *other, self.eps))
        rows, known = labels.unsqueeze(1) >= 0, known.rows(labels.clamp(min=0))
        chosen = [torch.where(rows, a, b) for a, b in zip(known, other, strict=True)]
        return apply_affine(x, fold_norm(moments, *chosen, self.eps))

    def plain(self, context: int | None) -> PlainNorm:
        priors = self.mixing(torch.float64)
        affine = [pick(t, context, priors) for t in (self.weight, self.bias)]
        if self.tracked:
            return PlainNorm(self.running_mean, self.running_var, *affine)
        return PlainNorm(None, None, *affine)

    def added_rows(self, like: int | None, share: float) -> dict[str, Tensor]:
        plain = self.plain(like)
        prior = added_prior(self.priors, share)
        return {"weight": plain.weight, "bias": plain.bias, "priors": prior}

    def _load_from_state_dict(self, state: dict, prefix: str, *args: Any) -> None:
        load_shared(state, prefix, {"weight": self.weight, "bias": self.bias}, {})
        self.load_priors(state, prefix, state.get(prefix + "weight"))
        super()._load_from_state_dict(state, prefix, *args)


class Shift(Method):
    name = "shift"
    title = "a method of this test"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        return ShiftNorm(source, site, contexts)

    def statistics(self, layer: nn.Module) -> Moments | None:
        return None


class ForgetsBias(Shift):
    name = "forgets-bias"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        layer = ShiftNorm(source, site, contexts)
        nn.init.zeros_(layer.bias)
        return layer


class MixesSamples(Shift):
    name = "mixes-samples"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        return Mixing(source, site, contexts)


class Mixing(ShiftNorm):
    def normalize(self, x: Tensor, labels: Tensor | None, unlabelled: bool) -> Tensor:
        y = super().normalize(x, labels, unlabelled)
        return y + 1e-9 * y.mean(0, keepdim=True)


class Unnamed(Shift):
    name = "unnamed"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        layer = ShiftNorm(source, site, contexts)
        layer.context_parameters = ()
        return layer


class DrawsNothing(Shift):
    name = "draws-nothing"
    stochastic = True


class PlainLayer(Shift):
    name = "plain-layer"

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        return nn.GroupNorm(1, site.num_features)


class Groups(Method):
    name = "groups"
    title = "group norm, a plain layer"
    needs_context = False
    keeps_function = False
    input_dependent = True

    def build(self, site: Site, source: nn.Module, contexts: Contexts, options: Any) -> nn.Module:
        layer = nn.GroupNorm(1, site.num_features, site.eps)
        if site.affine:
            layer.load_state_dict({"weight": source.weight, "bias": source.bias})
        return layer


# Slow, or of two processes; asked of every method, and of what varies one in exhaustive runs.
SLOW = {"compiles_into_one_graph", "exports", "gradients", "synchronised", "functional_transforms"}
# What the model around the layers does: options of a method change none of it.
AROUND = {"copies_and_pickles", "reverts_to_the_bit", "labels_in_scope_are_labels_given"}
# What the classes that the three augmentations share do, asked of MixStyle's.
SHARED = AROUND | {"saves_and_loads", "exports", "state_dict_goes_round", "input_gradient_is_kept"}
# What `tests.methods.test_acn_convert` asks of every kind of ACN.
HELD = {"acn": {"compiles_into_one_graph", "exports"}, "efdmix": SHARED, "dsu": SHARED}
VARIANTS = [
    (Shift, {}),
    (Groups, {}),
    ("cn", {"shrink": 4.0, "affine": "shared"}),
    ("cn-x", {"statistics": "batch"}),
]
EVERY = [
    *(
        (check, HELD.get(n, set()))
        for n in normswap.methods()
        for check in method_checks(n, processes=True)
    ),
    *(
        (check, SLOW | (AROUND if o else set()))
        for m, o in VARIANTS
        for check in method_checks(m, processes=True, **o)
    ),
]
FIRST = [check for check, left in EVERY if check.name not in left]
LEFT = [check for check, left in EVERY if check.name in left]


@pytest.mark.parametrize("check", sampled(FIRST + LEFT, len(FIRST)), ids=str)
def test_contract(check):
    check()


def test_a_method_that_breaks_the_contract_is_named_with_the_numbers():
    with pytest.raises(
        ContractError,
        match=r"'forgets-bias' fails function_is_kept\. Required: In eval mode .* Found: .*differ",
    ):
        check_method(ForgetsBias)
    checks = {check.name: check for check in method_checks(MixesSamples)}
    with pytest.raises(ContractError, match=r"ConvNet, labels .*: differ by .*e-\d+, allowed"):
        checks["a_batch_equals_its_samples"]()
    checks = {check.name: check for check in method_checks(DrawsNothing)}
    with pytest.raises(ContractError, match="the same output for each of 8 seeds"):
        checks["compiles_into_one_graph"]()


@pytest.mark.parametrize("name", ["function_is_kept", "moves", "contexts_differ_once_trained"])
def test_a_labelled_method_with_a_plain_layer_is_told_of_it(name):
    checks = {check.name: check for check in method_checks(PlainLayer)}
    with pytest.raises(ContractError, match=r"a subclass of ContextLayer .* got GroupNorm"):
        checks[name]()


def test_tables_that_no_name_tells_of_break_the_contract():
    checks = {check.name: check for check in method_checks(Unnamed)}
    with pytest.raises(ContractError, match=r"parameters is \[\]; .* are \['bias', 'weight'\]"):
        checks["moves"]()


def test_a_class_is_registered_for_its_checks_only():
    method_checks(Shift)[0]()
    assert "shift" not in normswap.methods()


def test_what_is_asked_follows_the_flags():
    names = {m: {c.name for c in method_checks(m)} for m in (Shift, Groups)}
    assert names[Shift] - names[Groups] >= {"function_is_kept", "labels_in_scope_are_labels_given"}
    assert names[Groups] - names[Shift] == {"a_change_of_function_is_said", "refuses_to_specialise"}


def test_what_is_no_method_is_refused():
    with pytest.raises(normswap.ConversionError, match="expected a method by name or class, got"):
        check_method(nn.GroupNorm)
    with pytest.raises(normswap.UnknownNameError, match="unknown method 'cnx'"):
        check_method("cnx")


@pytest.fixture
def _shift():
    normswap.register_method(Shift)
    yield
    del _REGISTRY["shift"]


@pytest.mark.usefixtures("_shift")
def test_a_registered_method_is_listed():
    assert "shift" in normswap.methods()


def test_a_name_is_taken_once():
    other = type("Other", (Shift,), {"name": "cn"})
    with pytest.raises(normswap.ConversionError, match="'cn' is registered already"):
        normswap.register_method(other)


def test_options_must_be_a_dataclass():
    other = type("Other", (Shift,), {"name": "other", "options": dict})
    with pytest.raises(normswap.ConversionError, match="dataclass"):
        normswap.register_method(other)
    assert "other" not in normswap.methods()


@pytest.mark.usefixtures("_shift")
def test_a_method_that_does_not_say_what_its_layers_equal_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(ShiftNorm, "plain")
    model = normswap.convert(make_model(), "shift", contexts=2)
    assert normswap.revert(model).state_dict().keys() == make_model().state_dict().keys()
    model.neck.weight.data[0] += 1
    with pytest.raises(normswap.ConversionError, match=r"neck .*'shift'.* equals no plain norm"):
        normswap.specialize(model, 0)
