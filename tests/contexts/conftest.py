"""Data of the tests of contexts."""

import warnings

import pytest
import torch
from sklearn.datasets import load_digits

from normswap import ContextWarning


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images / 16).float().unsqueeze(1), torch.tensor(data.target)


@pytest.fixture
def quiet():
    """Sets this small are tiny, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ContextWarning)
        yield
