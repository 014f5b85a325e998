"""Labels that are hidden from a training step with a probability."""

import numpy as np
import pytest
import torch

from normswap.contexts import drop_labels
from normswap.errors import ContextError


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_share_of_a_tensor_becomes_unknown_and_the_rest_stays(dtype):
    labels = (torch.arange(10_000) % 3).to(dtype)
    given = labels.clone()
    found = drop_labels(labels, 0.25, torch.Generator().manual_seed(0))
    assert found.dtype == torch.int64
    hidden = found == -1
    assert abs(hidden.double().mean().item() - 0.25) < 0.02  # four standard errors and more
    assert torch.equal(found[~hidden], labels[~hidden].long())
    assert torch.equal(labels, given)


@pytest.mark.parametrize("labels", [["a", "b", None] * 1000, np.array(["a", "b"] * 1500)])
def test_so_does_a_share_of_names(labels):
    found = drop_labels(labels, 0.5, torch.Generator().manual_seed(0))
    hidden = [a is None and b is not None for a, b in zip(found, labels, strict=True)]
    kept = [a for a, hide in zip(labels, hidden, strict=True) if not hide]
    assert kept == [a for a, hide in zip(found, hidden, strict=True) if not hide]
    known = sum(b is not None for b in labels)
    assert abs(sum(hidden) / known - 0.5) < 0.05


def test_all_or_none():
    labels = torch.tensor([0, 1, -1])
    assert torch.equal(drop_labels(labels, 0), labels)
    assert drop_labels(["a", "b"], 0.0) == ["a", "b"]
    assert drop_labels(labels, 1).tolist() == [-1, -1, -1]


def test_the_generator_decides_and_each_call_draws_anew():
    labels = torch.zeros(64, dtype=torch.int64)
    first, second = (drop_labels(labels, 0.5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(drop_labels(labels, 0.5), drop_labels(labels, 0.5))


@pytest.mark.parametrize(
    ("labels", "p", "match"),
    [
        (torch.zeros(3), 0.5, "integers"),
        (torch.tensor(1), 0.5, "one a sample"),
        ("photo", 0.5, "each sample"),
        (1, 0.5, "each sample"),
        (torch.tensor([1]), 1.5, "p="),
    ],
)
def test_what_does_not_fit_is_refused(labels, p, match):
    with pytest.raises(ContextError, match=match):
        drop_labels(labels, p)
