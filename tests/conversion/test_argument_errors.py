"""What an argument cannot be is an error that says what was meant."""

import copy
import functools
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import NormswapError
from normswap.util.arguments import check_callable, describe, meant
from tests.support.arguments import BASE, FUNCTIONS, IMAGES, Net
from tests.support.models import same


class NoRepr:
    """What cannot be shown."""

    def __repr__(self):
        raise RuntimeError("no repr")


def holds_itself():
    found = []
    found.append(found)
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
# Nothing takes these, except where the table says so.
JUNK = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "3": 3,
    "1e9": 10**9,
    "10**400": 10**400,
    "2.5": 2.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "''": "",
    "'ab'": "ab",
    "bytes": b"x",
    "[]": [],
    "['cn']": ["cn"],
    "[[1]]": [[1]],
    "[1, 'a']": [1, "a"],
    "{}": {},
    "{'a': 1}": {"a": 1},
    "set": {"a"},
    "object": object(),
    "no repr": NoRepr(),
    "lambda": lambda: 0,
    "tensors": lambda *a, **k: torch.ones(2),
    "scalar": torch.tensor(1),
    "vector": torch.randn(3),
    "bools": torch.tensor([True, False]),
    "sparse": torch.tensor([0, 1, 0, 1]).to_sparse(),
    "nested": NESTED,
    "meta": torch.ones(4, device="meta"),
    "complex": torch.ones(4, dtype=torch.complex64),
    "module": nn.ReLU(),
    "class": nn.ReLU,
    "itself": holds_itself(),
    "[None]": [None],
    "numpy": np.array(["a", "b"]),
    "dtype": torch.float32,
}
ARGUMENTS = [(name, argument) for name, (_, given) in FUNCTIONS.items() for argument in given]


@functools.cache
def converted(method):
    return normswap.convert(BASE, method, **({"contexts": 2} if method == "cn" else {}))


def fresh(value, tmp_path):
    """Return an argument that works, made anew where it is a model."""
    if isinstance(value, str) and value in ("converted", "adaptive"):
        return copy.deepcopy(converted("acn" if value == "adaptive" else "cn"))
    if isinstance(value, str) and value == "saved":
        return tmp_path
    if isinstance(value, str) and value == "base":
        return copy.deepcopy(BASE)
    return Net() if value is Net else value


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=lambda v: v)
def test_what_an_argument_cannot_be_is_an_error_of_ours(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("ignore")
    function, table = FUNCTIONS[name]
    if "folder" in table:
        normswap.save(converted("cn"), tmp_path)
    if name == "save":
        table = {**table, "folder": (tmp_path / "new", "")}
    takes = table[argument][1].split(", ")
    takes = [each for each in JUNK if each in takes]
    before = copy.deepcopy(BASE.state_dict())
    refused = 0
    for label, junk in JUNK.items():
        given = {key: fresh(value, tmp_path) for key, (value, _) in table.items()}
        given[argument] = junk
        if label in takes:
            function(**given)
            continue
        with pytest.raises(NormswapError) as error:
            function(**given)
        assert len(str(error.value)) < 700, label
        refused += 1
    assert refused >= len(JUNK) - 12
    assert same(BASE.state_dict(), before)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"context": 4}, "did you mean contexts=?"),
        ({"prior": [1]}, "did you mean priors=?"),
        ({"example_input": IMAGES}, "did you mean example_inputs=?"),
        ({"verfy": False}, "did you mean verify=?"),
        ({"method": "cnx"}, "did you mean 'cn-x'?"),
        ({"method": "CN"}, "did you mean 'cn'?"),
        ({"select": "bnn"}, "did you mean 'bn'?"),
        ({"method": "selfnorm", "placement": "norm", "select": "bnn"}, "did you mean 'bn'?"),
        ({"method": "self-norm"}, "did you mean 'selfnorm'?"),
        ({"preset": "resnet50-imagnet"}, "did you mean 'resnet50-imagenet'?"),
        ({"unknown": "poolde"}, "did you mean 'pooled'?"),
        ({"method": "selfnorm", "placement": "residuel"}, "did you mean 'residual'?"),
        ({"method": "selfnorm", "init": "identty"}, "did you mean 'identity'?"),
        ({"method": "crossnorm", "crops": "both"}, "did you mean crop=?"),
        ({"method": "acn", "component": 2}, "did you mean components=?"),
        ({"method": "acn", "assignment": "chanel"}, "did you mean 'channel'?"),
    ],
)
def test_what_was_probably_meant_is_said(given, hint):
    with pytest.raises(NormswapError) as error:
        normswap.convert(Net(), **{"method": "cn", **given})
    assert hint in str(error.value)


def test_plan_suggests_arguments_of_its_own():
    with pytest.raises(NormswapError) as error:
        normswap.plan(Net(), "cn", example_inputs=IMAGES)
    assert "example_inputs=?" not in str(error.value)


def test_contexts_are_suggested_too():
    model = normswap.convert(Net(), "cn", contexts=["photo", "sketch"])
    with pytest.raises(NormswapError, match="did you mean 'photo'"):
        model.eval()(IMAGES, context="foto")
    with pytest.raises(NormswapError, match="did you mean 'sketch'"):
        normswap.specialize(model, "skech")
    with pytest.raises(NormswapError, match="did you mean 'pooled'"):
        normswap.revert(model, "poled")


def test_a_long_list_of_choices_is_cut():
    model = normswap.convert(Net(), "cn", contexts=500)
    with pytest.raises(NormswapError, match="and 481 more"):
        normswap.specialize(model, "foto")


def test_what_is_shown_is_one_short_line():
    for value in (*JUNK.values(), "x\ny" * 1000, list(range(10**5))):
        assert len(describe(value)) <= 80
        assert "\n" not in describe(value)
    assert describe(torch.zeros(2, 3)) == "a tensor (2, 3) of float32"
    assert describe("much") == "'much'"


def test_no_name_is_suggested_that_is_not_close():
    assert meant("xyz", ["contexts"]) == ""
    assert meant(3, ["contexts"]) == ""


def test_functions_that_take_other_arguments_are_refused():
    check_callable("forward", lambda model, batch: 0, "forward(model, batch)", 2)
    check_callable("forward", max, "forward(model, batch)", 2)  # no signature to read
    with pytest.raises(NormswapError, match=r"called as forward\(model, batch\)"):
        check_callable("forward", lambda batch: 0, "forward(model, batch)", 2)


def test_a_batch_the_model_fails_on_is_named():
    model = normswap.convert(BASE, "cn", contexts=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        NormswapError, match=r"fails on a batch \(a tensor \(2, 5, 8, 8\) of float32"
    ):
        normswap.adapt(model, [IMAGES, torch.zeros(2, 5, 8, 8)], "0", progress=False)
    assert same(model.state_dict(), before)


def test_a_generator_of_selectors_selects_for_every_norm():
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(4)))
    report = normswap.plan(model, "cn", select=(str(i) for i in (0, 2)))
    assert [row.action for row in report.rows] == ["replaced", "kept", "replaced", "kept"]


def test_a_predicate_may_return_a_match_and_no_tensor():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    report = normswap.plan(model, "cn", select=lambda name, _: re.match("1", name))
    assert [row.action for row in report.rows] == ["kept", "replaced"]
    with pytest.raises(NormswapError, match="to return True or False, got a tensor"):
        normswap.plan(model, "cn", select=lambda name, module: module.weight > 0)
    with pytest.raises(NormswapError, match=r"called as fn\(name, module\)"):
        normswap.plan(model, "cn", select=lambda module: True)


@pytest.mark.parametrize("priors", [[1e308, 1e308], [1e-30, 1.0], [0.5, -1.0], [True, "a"]])
def test_priors_that_vanish_or_are_none_are_refused(priors):
    with pytest.raises(NormswapError, match=r"expected .*`priors`"):
        normswap.convert(Net(), "cn", contexts=2, priors=priors)


@pytest.mark.parametrize("call", [normswap.convert, normswap.plan])
@pytest.mark.parametrize("given", ["no", 1, None])
def test_trace_is_true_or_false(call, given):
    with pytest.raises(NormswapError, match="expected trace= as True or False, got"):
        call(Net(), "cn", contexts=2, trace=given)
