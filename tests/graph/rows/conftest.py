"""Fixtures of the tests of rows."""

import pytest

from normswap.graph.rows.run import Run


@pytest.fixture
def never_again(monkeypatch):
    """Return what makes any further measurement an error."""

    def refuse():
        def measure(*args, **kwargs):
            raise AssertionError("measured again")

        monkeypatch.setattr(Run, "measure", measure)

    return refuse
