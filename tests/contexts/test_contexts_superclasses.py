"""Contexts that are looked up by superclass."""

import hashlib

import pytest
import torch

from normswap import ContextError, ContextWarning, UnknownNameError, contexts


def superclasses(*arguments, **keywords):
    with pytest.warns(ContextWarning, match="leave the label unknown"):
        return contexts.from_superclasses(*arguments, **keywords)


def test_cifar100_is_the_published_table():
    assigner = superclasses("cifar100")
    fine = assigner(torch.arange(100))
    assert torch.bincount(fine).tolist() == [5] * 20
    # The coarse labels of the fine classes in order, as the data set's own files pair them.
    digest = hashlib.sha256(" ".join(map(str, fine.tolist())).encode()).hexdigest()
    assert digest.startswith("448687706f47d6d0eaafa691")


@pytest.mark.parametrize(
    ("name", "superclass"),
    [
        ("apple", "fruit_and_vegetables"),
        ("crab", "non-insect_invertebrates"),
        ("kangaroo", "large_omnivores_and_herbivores"),
        ("pickup_truck", "vehicles_1"),
        ("streetcar", "vehicles_2"),
        ("possum", "medium_mammals"),
    ],
)
def test_cifar100_knows_names(name, superclass):
    assigner = superclasses("cifar100")
    assert assigner.names[int(assigner(name))] == superclass


def test_a_superclass_always_says_that_the_label_is_unknown_at_test_time():
    targets = torch.arange(100).repeat(40)
    assigner = superclasses("cifar100", targets=targets)
    assert "leave the label unknown at test time" in str(assigner.report())
    assert assigner.report().leak == pytest.approx(1)


def test_superclasses_count_targets():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, ["cat", "tiger"], [0] * 90 + [1] * 40)
    assert assigner.sizes == (90, 40)
    assert assigner.priors.tolist() == pytest.approx([9 / 13, 4 / 13])


def test_unknown_classes_are_minus_one():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, classes=["tiger", "cat"])
    assert assigner(torch.tensor([0, 1, 2, -1])).tolist() == [1, 0, -1, -1]
    assert assigner(["cat", "zebra", None]).tolist() == [0, -1, -1]


def test_indices_need_the_order_of_the_classes():
    with pytest.raises(ContextError, match=r"from_superclasses\(\.\.\., classes="):
        superclasses({"cat": "pet", "tiger": "wild"})(torch.tensor([0]))


def test_a_mapping_from_indices_takes_indices():
    assert superclasses({7: "a", 9: "b"})(torch.tensor([9, 7, 8])).tolist() == [1, 0, -1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "expected a mapping"),
        (({1: "a", "b": "c"},), "expected a mapping"),
        (({"a": 1},), "expected a mapping"),
        ((None,), "expected a dict"),
        (({"a": "b"}, ["a", "z"]), "found none for z"),
    ],
)
def test_mappings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ContextError, match=message):
        contexts.from_superclasses(*arguments)


def test_an_unknown_table_is_refused():
    with pytest.raises(UnknownNameError, match="there is 'cifar100'"):
        contexts.from_superclasses("imagenet")


def test_float_classes_are_refused():
    with pytest.raises(ContextError, match=r"integers \(N,\), got torch.float32"):
        superclasses("cifar100")(torch.zeros(3))


def test_a_report_of_other_samples_needs_their_labels():
    assigner = superclasses({"cat": "pet", "tiger": "wild"}, ["cat", "tiger"])
    with pytest.raises(ContextError, match="call report"):
        assigner.report(targets=[0, 1])
    labels = assigner(torch.tensor([0, 1, 1]))
    assert assigner.report([0, 1, 1], labels).sizes == (1, 2)
    with pytest.raises(ContextError, match=r"labels in \[-1, 2\)"):
        assigner.report(labels=labels + 1)
    with pytest.raises(ContextError, match="as many targets as labels, 3, got 2"):
        assigner.report([0, 1], labels)
