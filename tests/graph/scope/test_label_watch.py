"""Labels that tell a model nothing are warned of, once."""

import copy
import warnings

import pytest
import torch
from torch import nn

import normswap
from normswap import ContextWarning

IMAGES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def make(**settings):
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return normswap.convert(base, "cn", contexts=["day", "night"], **settings)


def train(model, labels, forwards=20, **given):
    for _ in range(forwards):
        model.train()(IMAGES, context=labels, **given)


def silent(run, *given, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*given, **settings)


ALL_OF_ONE = {
    "a name": "night",
    "names": ["night"] * 4,
    "numbers": torch.ones(4, dtype=torch.int64),
}


@pytest.mark.parametrize("labels", ALL_OF_ONE.values(), ids=ALL_OF_ONE)
def test_training_on_one_context_alone_warns_once(labels):
    model = make()
    silent(train, model, labels, forwards=19)
    with pytest.warns(ContextWarning, match=r"first 20 .* of context 'night', of 2 contexts"):
        train(model, labels, forwards=1)
    silent(train, model, labels)


def test_training_on_unknown_labels_alone_warns():
    with pytest.warns(ContextWarning, match=r"are unknown \(-1\)"):
        train(make(), torch.full((4,), -1))


def test_batches_of_one_context_each_are_fine():
    model = make()
    for _ in range(20):
        silent(train, model, "day", forwards=1)
        silent(train, model, "night", forwards=1)


def test_eval_without_labels_after_training_with_them_warns_once():
    model = make()
    train(model, torch.arange(4) % 2)
    silent(model.eval(), IMAGES, context="day")
    with pytest.warns(ContextWarning, match=r"no labels, .* normswap.set_unknown"):
        model(IMAGES)
    silent(model, IMAGES)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda model: model[:2]], ids=["copy", "part"])
def test_a_copy_or_a_part_without_labels_after_training_with_them_warns_once(take):
    model = make()
    train(model, torch.arange(4) % 2)
    other = take(model).eval()
    silent(other, IMAGES, context="day")
    with pytest.warns(ContextWarning, match="no labels"):
        other(IMAGES)
    silent(model.eval(), IMAGES)


def test_labels_of_a_block_count():
    model = make()
    with normswap.use_context(model, torch.arange(4) % 2):
        train(model, None)
        silent(model.eval(), IMAGES)
    with pytest.warns(ContextWarning, match="no labels"):
        model(IMAGES)


@pytest.mark.parametrize("late", [False, True])
def test_a_policy_that_was_chosen_does_not_warn(late):
    model = make(unknown=None if late else "pooled")
    train(model, torch.arange(4) % 2)
    if late:
        normswap.set_unknown(model, "posterior")
    silent(model.eval(), IMAGES)


def test_one_context_does_not_warn():
    model = normswap.convert(nn.Sequential(nn.BatchNorm1d(3)), "cn")
    silent(train, model, torch.zeros(4, dtype=torch.int64))
    silent(model.eval(), IMAGES)
