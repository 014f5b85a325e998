import pytest

from normswap.functional import backend


@pytest.fixture
def on_the_device(monkeypatch):
    """Have the kernels run where the cases are: in the interpreter, or on the GPU."""
    # Not above: Triton need not be installed.
    from tests.functional.triton.values import DEVICE

    monkeypatch.setattr(backend, "DEVICES", (DEVICE,))
