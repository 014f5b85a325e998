"""Names of contexts are never taken for others: in state dicts, or as numbers."""

import io
import warnings

import numpy
import pytest
import torch
from torch import nn

import normswap
from normswap import ContextWarning
from tests.support.builders import trained_norm

NAMES = ["day", "night", "fog"]


def convert(contexts, method="cn"):
    return normswap.convert(nn.Sequential(trained_norm()), method, contexts=contexts, verify=False)


@pytest.mark.parametrize("method", ["cn", "cn-x"])
@pytest.mark.parametrize("others", [NAMES[::-1], ["rain", *NAMES[:2]]])
def test_rows_of_a_state_dict_in_another_order_are_refused(others, method):
    file = io.BytesIO()
    torch.save(convert(NAMES, method).state_dict(), file)
    file.seek(0)
    model = convert(others, method)
    before = model[0].weight.clone()
    with pytest.raises(RuntimeError, match=r"got day, night, fog; convert with contexts=\['day'"):
        model.load_state_dict(torch.load(file), strict=False)
    assert torch.equal(before, model[0].weight)


@pytest.mark.parametrize("others", [NAMES, 3, ["sun", "moon", "fog"]])
def test_rows_of_a_state_dict_in_the_same_order_are_taken(others):
    model, state = convert(others), convert(NAMES).state_dict()
    state["0.weight"] *= torch.arange(1, 4)[:, None]
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"])
    model.load_state_dict(dict(state))  # which has no order of names


def test_names_that_are_numbers_of_other_contexts_warn():
    with pytest.warns(ContextWarning, match="is the number of another context"):
        convert(["0", "1", "10", "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ContextWarning)
        for contexts in (["0", "1", "2"], ["2019", "2020"], NAMES, 4):
            convert(contexts)


@pytest.mark.parametrize(
    ("contexts", "names"),
    [
        (numpy.unique(["night", "day", "day"]), ["day", "night"]),
        (numpy.array([0, 2, 1]).max() + 1, ["0", "1", "2"]),
        (torch.tensor([0, 2, 1]).max() + 1, ["0", "1", "2"]),
    ],
)
def test_contexts_are_counted_and_named_by_arrays_too(contexts, names):
    assert list(normswap.summary(convert(contexts)).contexts) == names
