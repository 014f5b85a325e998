"""Fixtures of the tests of the scope."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.behave import Both, Own
from tests.support.scoped import make


@pytest.fixture(params=[Own, Both], ids=["scoped", "threaded"])
def model(request):
    return make(request.param())


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool
