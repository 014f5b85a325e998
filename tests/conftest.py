import gc
import multiprocessing
import os

# Threads that wait sleep instead of spinning: with other work on the machine, spinning made steps
# several times slower. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# The compiler takes the kernel's word for what the processor can, and starts no Python to try it.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch

# Processes that tests start are forked from one that has imported, once, what they need.
multiprocessing.set_forkserver_preload(["pytest", "tests.sweep.one"])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _threads():
    # Tensors of tests are small: a second thread waits longer than it works.
    torch.set_num_threads(1)


def pytest_collection_finish():
    """Collect garbage of tests alone, and less often: what is imported by now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(config, items):
    """Leave out what needs a GPU where there is none; a rehearsal says what it skips."""
    if torch.cuda.is_available():
        return
    of_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if "NORMSWAP_TEST_DEVICE" in os.environ:
        for item in of_gpu:
            if "device" not in item.fixturenames:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        return
    left_out = set(of_gpu)
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=of_gpu)
