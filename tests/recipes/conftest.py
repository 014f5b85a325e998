import os
from pathlib import Path

# As recipes/__main__.py does, and for its reason; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread():
    """Models here are too small to gain from more, and runs are compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two domains of two classes of five images, each of its own colour."""
    root = tmp_path / "pictures"
    for d, domain in enumerate(("night", "day")):
        for c, name in enumerate(("cat", "dog")):
            (root / domain / name).mkdir(parents=True)
            for i in range(5):
                colour = (50 * (d + 1), 100 * (c + 1), 40 * (i + 1))
                Image.new("RGB", (40, 30), colour).save(root / domain / name / f"{i}.png")
    return root
