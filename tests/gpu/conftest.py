import os

# Without, cuBLAS has no deterministic products; read where CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tests.gpu.steps import DEVICE


@pytest.fixture
def device():
    """The device under test; a rehearsal without a GPU names the CPU."""
    return torch.device(os.environ.get(DEVICE, "cuda"))


@pytest.fixture
def cuda(device):
    """The device under test, for what the CPU has not."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True, scope="session")
def _full_float32():
    """Have convolutions keep float32's digits, as on the CPU; products do so anyway."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _may_wait():
    """A test that fails while the host must not wait leaves that to no other."""
    yield
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
