import os
from pathlib import Path

# As recipes/__main__.py does, and for its reason; before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
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


@pytest.fixture(scope="session")
def sites(tmp_path_factory):
    """Two sites of five training images and two that test; a bright bar is the vessel."""
    root = tmp_path_factory.mktemp("retina")
    draw = np.random.default_rng(0)
    for site, (wide, light) in {"east": (64, 60), "west": (56, 120)}.items():
        for part, number in (("train", 5), ("test", 2)):
            for kind in ("images", "masks"):
                (root / site / part / kind).mkdir(parents=True)
            for index in range(number):
                mask = np.zeros((64, wide), np.uint8)
                mask[:, 10 + 6 * index : 14 + 6 * index] = 1
                pixels = draw.integers(0, light, (64, wide, 3)) + 80 * mask[..., None]
                Image.fromarray(pixels.astype(np.uint8)).save(
                    root / site / part / f"images/{index}.png"
                )
                Image.fromarray(mask).save(root / site / part / f"masks/{index}.png")
    return root
